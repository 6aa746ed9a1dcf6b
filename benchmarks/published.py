"""Head files from published code, read with the readers of interp and compared with known figures.

    python -m benchmarks.published FOLDER

Files are found below FOLDER by their paths in the repositories that ship them: head_score/MODEL.json (Retrieval_Head),
MODEL/.../full_attention_heads.tsv (DuoAttention), *_qr_head*.yaml (QRHead), *_head_idx.json (CompressKV). A cell is
the value that was read / the known value, with a dash if there is none. The exit status is 1 if two values differ, if a
file is rejected, or if no file is found.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from interp.analyses.identify.duo_gates import gate_shares
from interp.analyses.results import head_list_formats as formats
from interp.analyses.results.head_scores import HeadScores
from interp.errors import ScoreError
from interp.hooks.model.heads import Head

Figure = int | float | str | tuple[str, ...]
"""Counts, sizes and orders are exact, but only the beginning of an order is known. Shares have three known decimals."""

HALF = 0.0005 + 1e-6
"""Half of the third decimal, because figures are rounded to it."""


@dataclass(frozen=True)
class Format:
    """One kind of file, and the known figures of its published files."""

    name: str
    source: str
    pattern: str
    read: Callable[[Path], HeadScores]
    figures: Callable[[HeadScores], Mapping[str, Figure]]
    known: Mapping[str, Mapping[str, Figure]]
    """Known figures by the stem of the file, or by the name of a folder that contains it."""
    of_folder: bool = False

    def model(self, path: Path) -> str:
        """Return the entry of `known` for a file, or else a name for the file."""
        names = [parent.name for parent in path.absolute().parents] if self.of_folder else [path.stem]
        return next((name for name in names if name in self.known), names[0])


@dataclass(frozen=True)
class Read:
    """A file with its figures and the known figures, or the reason why it was rejected."""

    kind: Format
    name: str
    figures: Mapping[str, Figure]
    known: Mapping[str, Figure]
    refused: str = ""

    @property
    def complaints(self) -> list[str]:
        """One sentence per figure that differs from the known one."""
        if self.refused:
            return [self.refused]
        return [
            f"{self.name}: {title} is {shown(self.figures.get(title))}, expected {shown(value, 3)}"
            for title, value in self.known.items()
            if not agrees(self.figures.get(title), value)
        ]

    @property
    def titles(self) -> list[str]:
        """Names of the figures. Orders are shown only if they are known."""
        return [title for title, value in self.figures.items() if title in self.known or not isinstance(value, tuple)]

    def cell(self, title: str) -> str:
        """Return the cell of the table for one figure."""
        if title not in self.titles:
            return ""
        known = self.known.get(title)
        read = self.figures[title]
        if isinstance(read, tuple) and isinstance(known, tuple):
            read = read[: len(known)]
        return f"{shown(read)} / {shown(known, 3)}"


def files(folder: Path) -> list[Read]:
    """Read every file of a known format below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = []
    for kind in FORMATS:
        for path in (path for path in paths if path.absolute().match(kind.pattern)):
            model = kind.model(path)
            known = kind.known.get(model, {})
            name = model if known else str(path.relative_to(folder))
            try:
                found.append(Read(kind, name, kind.figures(kind.read(path)), known))
            except ScoreError as error:
                found.append(Read(kind, name, {}, known, refused=str(error)))
    return found


def agrees(read: Figure | None, known: Figure) -> bool:
    """Return whether a figure equals the known one."""
    if isinstance(known, tuple):
        return isinstance(read, tuple) and read[: len(known)] == known
    if isinstance(known, float):
        return isinstance(read, int | float) and abs(read - known) <= HALF
    return read == known


def shown(value: Figure | None, digits: int = 4) -> str:
    """Format a figure."""
    if isinstance(value, tuple):
        return " ".join(value)
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return "-" if value is None else str(value)


def table(rows: list[Read]) -> str:
    """Return the Markdown table of some files."""
    titles = list(dict.fromkeys(title for row in rows for title in row.titles))
    lines = ["| file | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    lines += [f"| {row.name} | " + " | ".join(map(row.cell, titles)) + " |" for row in rows]
    return "\n".join(lines)


def named(titles: tuple[str, ...], *values: Figure) -> dict[str, Figure]:
    return dict(zip(titles, values, strict=True))


def heads(names: str) -> tuple[str, ...]:
    return tuple(str(Head.parse(name)) for name in names.split())


def first(scores: HeadScores, k: int) -> tuple[str, ...]:
    return tuple(map(str, scores.top(k)))


RETRIEVAL = (
    "heads",
    "instances",
    "0 for every head",
    "mean at least 0.1",
    "exactly 0",
    "active in all others",
    "highest mean",
    "first heads",
)


def retrieval(scores: HeadScores) -> dict[str, Figure]:
    each = scores.per_prompt.nan_to_num(nan=0.0)
    live = each.flatten(1).any(1)
    return named(
        RETRIEVAL,
        int((~scores.values.isnan()).sum()),
        # instances that every head has, so that a list that is too short is detected
        int((~scores.per_prompt.isnan()).flatten(1).all(1).sum()),
        int((~live).sum()),
        int((scores.values >= 0.1).sum()),
        float((scores.values == 0).float().mean()),
        int((each[live] > 0).all(0).sum()),
        float(scores.values.nan_to_num(nan=0.0).max()),
        first(scores, 3),
    )


GATES = ("layers x kv heads", "at least 0.5", "above 0.9", "below 0.02", "mean")


def gates(scores: HeadScores) -> dict[str, Figure]:
    shares = gate_shares(scores)
    size = f"{scores.layers}x{scores.layout.kv_heads}"
    return named(GATES, size, shares.half, shares.open, shares.closed, shares.mean)


RANKED = ("heads", "first heads")


def ranked(scores: HeadScores) -> dict[str, Figure]:
    listed = len(scores.heads())
    return named(RANKED, listed, first(scores, listed))


ORDERS = ("layers x heads", "layers that list all heads")


def orders(scores: HeadScores) -> dict[str, Figure]:
    counts = named(ORDERS, f"{scores.layers}x{scores.n_heads}", int((scores.values > 0).all(1).sum()))
    order = scores.values.argsort(dim=1, descending=True, stable=True).tolist()
    return counts | {f"layer {layer}": tuple(map(str, row)) for layer, row in enumerate(order)}


FORMATS = (
    Format(
        "Retrieval_Head",
        "counted in the seven files of nightdessert/Retrieval_Head (2024-08-02)",
        "head_score/*.json",
        formats.read_retrieval_head,
        retrieval,
        {
            "llama-2-7b-80k": named(RETRIEVAL, 1024, 586, 0, 33, 0.702, 12, 0.943, heads("16-19 11-15 8-26")),
            "llama-2-13b-64k": named(RETRIEVAL, 1600, 367, 0, 33, 0.732, 8, 0.905, heads("13-23 9-33 21-5")),
            "Mistral-7B-v0.2-hf": named(RETRIEVAL, 1024, 362, 0, 43, 0.650, 31, 0.943, heads("18-0 12-7 12-6")),
            "Mixtral-8x7B-v0.1": named(RETRIEVAL, 1024, 390, 0, 63, 0.576, 40, 0.945, heads("12-7 18-0 18-2")),
            "Yi-6B-200K": named(RETRIEVAL, 1024, 567, 20, 53, 0.494, 0, 0.778, heads("17-2 14-9 17-6")),
            "Qwen1.5-14B": named(RETRIEVAL, 1600, 390, 8, 61, 0.534, 34, 1.003, heads("12-2 14-12 23-16")),
            "Qwen1.5-14B-Chat": named(RETRIEVAL, 1600, 221, 8, 68, 0.711, 29, 0.525, heads("14-12 20-7 23-16")),
        },
    ),
    Format(
        "DuoAttention",
        "counted in the six tables of mit-han-lab/duo-attention",
        "full_attention_heads.tsv",
        formats.read_duo_attention,
        gates,
        {
            "Llama-2-7B-32K-Instruct": named(GATES, "32x32", 0.436, 0.283, 0.450, 0.419),
            "Llama-3-8B-Instruct-Gradient-1048k": named(GATES, "32x8", 0.812, 0.609, 0.129, 0.769),
            "Llama-3-8B-Instruct-Gradient-4194k": named(GATES, "32x8", 0.812, 0.594, 0.102, 0.775),
            "Meta-Llama-3.1-8B-Instruct": named(GATES, "32x8", 0.914, 0.645, 0.031, 0.852),
            "Mistral-7B-Instruct-v0.2": named(GATES, "32x8", 0.953, 0.852, 0.039, 0.923),
            "Mistral-7B-Instruct-v0.3": named(GATES, "32x8", 0.938, 0.820, 0.043, 0.905),
        },
        of_folder=True,
    ),
    Format(
        "QRHead",
        "read in the configurations of princeton-pli/QRHead; 16 heads for models of this size by 2506.09944",
        "*_qr_head*.yaml",
        formats.read_qrhead,
        ranked,
        {
            "Llama-3.1-8B-Instruct_qr_head_LME": named(
                RANKED, 16, heads("13-18 13-21 8-11 14-13 17-29 13-1 13-13 14-29")
            ),
            "Llama-3.1-8B-Instruct_qr_head_NQ": named(RANKED, 16, heads("14-22 13-16 14-28 14-31 16-19 14-1")),
            "Qwen2.5-7B-Instruct_qr_head_NQ": named(RANKED, 16, heads("16-19 16-2 16-20 16-14 16-0")),
        },
    ),
    Format(
        "CompressKV",
        "orders read in the file of Llama-3.1-8B in TUDa-HWAI/CompressKV, sizes in the models' configurations",
        "*_head_idx.json",
        formats.read_compresskv,
        orders,
        {
            "Llama-3.1-8B-Instruct_head_idx": named(
                (*ORDERS, "layer 0", "layer 5", "layer 8"),
                "32x32",
                32,
                ("11", "25", "23", "27"),
                ("8", "10", "9", "11"),
                ("11", "1", "8", "9"),
            ),
            "Qwen2.5-7B-Instruct_head_idx": named(ORDERS, "28x28", 28),
        },
    ),
)


def main(
    folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Folder with the files of the repositories.")
    ],
) -> None:
    """Read published head files and compare them with known figures."""
    found = files(folder)
    for kind in FORMATS:
        if rows := [read for read in found if read.kind is kind and not read.refused]:
            typer.echo(f"{kind.name}, {kind.source}:\n\n{table(rows)}\n")
    complaints = [complaint for read in found for complaint in read.complaints]
    known = sum(len(read.known) for read in found)
    typer.echo("\n".join([*complaints, f"{len(found)} files, {known} known figures, {len(complaints)} complaints"]))
    if complaints or not found:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
