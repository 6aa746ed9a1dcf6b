"""Readers and writers of the head lists of published code: Retrieval_Head, DuoAttention, QRHead and CompressKV."""

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from interp.analyses.results.files import read_text
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.table_statistics import order_of
from interp.errors import HeadError, ScoreError
from interp.hooks.limits import MAX_INDEX, parse_json, parse_yaml, shortened
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.writer import write_atomic

# far more heads than any model has: a file with more is broken
_MAX_HEADS = 1_000_000
_MAX_SCORE = torch.finfo(torch.float32).max


def read_retrieval_head(path: str | Path, layout: HeadLayout | None = None) -> HeadScores:
    """Read scores in the format of nightdessert/Retrieval_Head: `{"layer-head": [score per counted instance, ...]}`.

    Heads that are not in the file are NaN, and so are the instances that a shorter list does not have.
    `settings["zero_instances"]` counts the instances that are 0 for every head. In published files the answer span of
    these was not found, and they lower every mean.

    Args:
        path: The JSON file.
        layout: Layers and heads of the model; None takes the largest that the file names.

    Returns:
        HeadScores: Scores `[n l h]` with the threshold 0.1.

    Raises:
        ScoreError: If the file cannot be read, is broken, or belongs to another model.

    Source:
        Wu et al. 2404.15574.
    """
    path = Path(path)
    stored = _json(path, "head to scores")
    if not isinstance(stored, dict) or not stored:
        raise ScoreError(
            f'{path} names no heads; expected {{"layer-head": [scores], ...}} (no instance may have counted).'
        )
    scores = {_head(key, path): _numbers(values, key, path) for key, values in stored.items()}
    if len(scores) < len(stored):
        raise ScoreError(f"{path} names a head twice; expected one entry for each.")
    layout = _layout(HeadSet(tuple(scores)), layout, path)
    n = max(map(len, scores.values()))
    if not n:
        raise ScoreError(f"{path} has no scores; no instance counted, which is no result about heads.")
    if n * layout.size > 100 * _MAX_HEADS:
        raise ScoreError(f"{path} would be a table of {n}x{layout.layers}x{layout.heads}; the file is broken.")
    per_prompt = torch.full((n, layout.layers, layout.heads), torch.nan)
    for head, values in scores.items():
        per_prompt[: len(values), head.layer, head.head] = torch.tensor(values)
    silent = int((per_prompt.nan_to_num(nan=0.0) == 0).flatten(1).all(1).sum())
    settings = {"format": "Retrieval_Head", "file": path.name, "zero_instances": silent}
    unit = "share of answer tokens copied"
    return HeadScores("retrieval", per_prompt, unit, layout.kv_heads, threshold=0.1, settings=settings)


def write_retrieval_head(scores: HeadScores, path: str | Path) -> Path:
    """Write scores in the format of nightdessert/Retrieval_Head: one line, without the prompts that do not count.

    A prompt that counts for some heads only makes the lists of the others shorter.

    Args:
        scores: The scores.
        path: The JSON file.

    Returns:
        Path: The file.

    Raises:
        ScoreError: If the file cannot be written.
    """
    lists = {
        f"{head.layer}-{head.head}": [value for value in column.tolist() if not math.isnan(value)]
        for head, column in zip(scores, scores.per_prompt.flatten(1).T, strict=True)
    }
    return _write(path, json.dumps(lists) + "\n")


def read_duo_attention(path: str | Path, heads: int | None = None, layout: HeadLayout | None = None) -> HeadScores:
    """Read gates in the format of mit-han-lab/duo-attention: one row per layer, one column per key-value head.

    The values are those of the file; training makes some of them slightly negative.

    Args:
        path: `full_attention_heads.tsv`, or the folder that holds it.
        heads: Number of query heads of a layer. All query heads of a group get its gate.
        layout: Layers and heads of the model, in place of `heads`. Without both the table is per key-value head.

    Returns:
        HeadScores: One row `[1 l h]` of gates.

    Raises:
        ScoreError: If the file cannot be read, is broken, or belongs to another model.

    Source:
        Xiao et al. 2410.10819.

    Limits:
        Does not show which query head of a group matters, since a gate closes the whole group.
    """
    path = Path(path)
    path = path / "full_attention_heads.tsv" if path.is_dir() else path
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    rows = [_row(line, number, path) for number, line in enumerate(lines, 1)]
    if not rows or len({len(row) for row in rows}) > 1:
        widths = sorted({len(row) for row in rows})
        raise ScoreError(
            f"{path} is no table (rows of {widths} columns); expected a row per layer, a column per kv head."
        )
    gates = torch.tensor(rows)
    layers, kv_heads = gates.shape
    if layout is not None and (layout.layers, layout.kv_heads) != (layers, kv_heads):
        raise ScoreError(
            f"{path} is {layers}x{kv_heads}, but the model has {layout.layers} layers of {layout.kv_heads} "
            "key-value heads; give the file of this model."
        )
    heads = heads or (layout.heads if layout else kv_heads)
    if heads % kv_heads:
        raise ScoreError(f"{path} has {kv_heads} key-value heads, of which {heads} query heads is no multiple.")
    per_prompt = gates.repeat_interleave(heads // kv_heads, dim=1)[None]
    settings = {"format": "DuoAttention", "file": path.name, "per": "query head" if heads > kv_heads else "kv head"}
    return HeadScores("duo_attention", per_prompt, "gate of full attention", kv_heads, settings=settings)


def write_duo_attention(scores: HeadScores, path: str | Path, reduce: Literal["max", "mean"] | None = None) -> Path:
    """Write scores as a DuoAttention table of key-value heads, separated by tabs.

    Args:
        scores: The scores.
        path: The file.
        reduce: "max" or "mean" over the query heads of a group; needed only where they differ.

    Returns:
        Path: The file.

    Raises:
        ScoreError: If a head has no score, query heads of a group differ and `reduce` is not given, or the file cannot
            be written.
    """
    groups = scores.values.unflatten(1, (scores.layout.kv_heads, -1))
    _check_scored(scores, "a DuoAttention table")
    if reduce not in (None, "max", "mean"):
        raise ScoreError(f'unknown reduce={reduce!r}; choose "max" or "mean".')
    if reduce is None and not torch.equal(groups.amin(2), groups.amax(2)):
        raise ScoreError(f'\'{scores.name}\' differs within key-value groups; pass reduce="max" or reduce="mean".')
    gates = groups.mean(2) if reduce == "mean" else groups.amax(2)
    return _write(path, "".join("\t".join(f"{gate:.18e}" for gate in row) + "\n" for row in gates.tolist()))


def read_qrhead(path: str | Path, layout: HeadLayout | None = None) -> HeadScores:
    """Read a head list in the format of princeton-pli/QRHead: YAML with `attn_head_set: "layer-head,..."`, best first.

    The file holds an order and no scores. Head i of n gets the value `(n - i) / n`, and heads that are not listed get
    0, so that `top` and `heads` return the list. The list "full_heads" gives 1 to every head.

    Args:
        path: The YAML file.
        layout: Layers and heads of the model; needed for "full_heads".

    Returns:
        HeadScores: One row `[1 l h]` of ranks.

    Raises:
        ScoreError: If the file cannot be read, is broken, or belongs to another model.

    Source:
        Zhang et al. 2506.09944.
    """
    path = Path(path)
    text = read_text(path)
    try:
        stored = parse_yaml(text)
    except ValueError as error:
        raise ScoreError(f"{path} is not YAML that can be read ({error}); expected a list of heads.") from error
    stored = stored if isinstance(stored, Mapping) else {}
    listed = stored.get("attn_head_set")
    if not isinstance(listed, str | list) or not listed:
        raise ScoreError(f'{path} has no "attn_head_set"; expected a text such as "13-18,13-21".')
    if listed == "full_heads":
        if layout is None:
            raise ScoreError(f'{path} lists "full_heads", all heads of its model; pass layout=HeadLayout.of(model).')
        per_prompt = torch.ones(1, layout.layers, layout.heads)
    else:
        words = listed.split(",") if isinstance(listed, str) else listed
        heads = [_head(word, path) for word in words if not isinstance(word, str) or word.strip()]
        if not heads:
            raise ScoreError(f"{path} names no heads; expected at least one.")
        if len(set(heads)) < len(heads):
            raise ScoreError(f"{path} names a head twice; expected each once, best first.")
        layout = _layout(HeadSet(tuple(heads)), layout, path)
        per_prompt = torch.zeros(1, layout.layers, layout.heads)
        for rank, head in enumerate(heads):
            per_prompt[0, head.layer, head.head] = (len(heads) - rank) / len(heads)
    settings = {"format": "QRHead", "file": path.name, "model": str(stored.get("model_name_or_path", ""))}
    return HeadScores("qrhead", per_prompt, "rank", layout.kv_heads, threshold=0.0, settings=settings)


def write_qrhead(scores: HeadScores, path: str | Path, top: int = 16, model: str = "") -> Path:
    """Write the top heads, best first, as a QRHead configuration; heads at the floor of the table are left out.

    Args:
        scores: The scores.
        path: The YAML file.
        top: Number of heads; fewer are written where fewer are above the floor.
        model: Name of the model, by default the model of the scores.

    Returns:
        Path: The file.

    Raises:
        ScoreError: If no head is above the floor of the table, or the file cannot be written.
    """
    heads = scores.top(top)
    if not heads:
        raise ScoreError(f"'{scores.name}' ranks no head, which a list cannot hold; give scores that differ.")
    model = model or (scores.provenance.model if scores.provenance else str(scores.settings.get("model", "")))
    entries = {
        "attn_head_set": ",".join(f"{head.layer}-{head.head}" for head in heads),
        "model_base_class": model.rpartition("/")[2],
        "model_name_or_path": model,
    }
    return _write(path, "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items()))


def read_compresskv(path: str | Path, layout: HeadLayout | None = None) -> HeadScores:
    """Read a head order in the format of TUDa-HWAI/CompressKV: `{"layer": [head, ...best first], ...}`, all layers.

    The file holds orders and no scores. Head i of the n that its layer lists gets the value `(n - i) / n`, and heads
    that are not listed get 0. `kv.CompressKV.from_scores` takes its voters from such a table.

    Args:
        path: The JSON file.
        layout: Layers and heads of the model; None takes the largest that the file names.

    Returns:
        HeadScores: One row `[1 l h]` of ranks within the layer.

    Raises:
        ScoreError: If the file cannot be read, is broken, or belongs to another model.

    Source:
        CompressKV 2508.02401.

    Limits:
        Does not show that a layer has such a head at all. Values compare only within a layer.
    """
    path = Path(path)
    stored = _json(path, "layer to heads")
    if not isinstance(stored, dict) or not stored:
        raise ScoreError(f'{path} names no layers; expected {{"layer": [head, ...best first], ...}}.')
    orders = {_layer(key, path): _order(heads, key, path) for key, heads in stored.items()}
    if len(orders) < len(stored):
        raise ScoreError(f"{path} names a layer twice; expected one order for each.")
    if left_out := set(range(len(orders))) - set(orders):
        raise ScoreError(f"{path} has no order for layer {min(left_out)}; expected one for every layer from 0.")
    heads = HeadSet(tuple(Head(layer, head) for layer, order in orders.items() for head in order))
    layout = _layout(heads, layout, path)
    if layout.layers != len(orders):
        raise ScoreError(f"{path} orders {len(orders)} layers of {layout.layers}; give the file of this model.")
    per_prompt = torch.zeros(1, layout.layers, layout.heads)
    for layer, order in orders.items():
        per_prompt[0, layer, order] = torch.arange(len(order), 0, -1) / len(order)
    settings = {"format": "CompressKV", "file": path.name}
    return HeadScores("compresskv", per_prompt, "rank in its layer", layout.kv_heads, threshold=0.0, settings=settings)


def write_compresskv(scores: HeadScores, path: str | Path) -> Path:
    """Write the heads of each layer, best first, in the format of CompressKV.

    A layer lists its heads above their floor, see `table_statistics.floors`. The format has no empty layer, so a layer
    in which no head is above the floor lists all of its heads. Ties are in a random order, by the seed of the table.

    Args:
        scores: The scores.
        path: The JSON file.

    Returns:
        Path: The file.

    Raises:
        ScoreError: If a head has no score, or the file cannot be written.
    """
    _check_scored(scores, "an order of all heads")
    orders, ranked = order_of(scores.values, torch.Generator().manual_seed(scores.seed))
    lists = {
        str(layer): order[: count or len(order)]
        for layer, (order, count) in enumerate(zip(orders.tolist(), ranked.tolist(), strict=True))
    }
    return _write(path, json.dumps(lists) + "\n")


def _json(path: Path, what: str) -> Any:
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ScoreError(f"{path} is not JSON ({error}); expected one object of {what}.") from error


def _check_scored(scores: HeadScores, what: str) -> None:
    if scores.values.isnan().any():
        raise ScoreError(f"'{scores.name}' has heads without a score, which {what} cannot hold; score all heads.")


def _write(path: str | Path, text: str) -> Path:
    return write_atomic(path, text.encode())


def _head(name: Any, path: Path) -> Head:
    try:
        return Head.parse(name)
    except HeadError as error:
        shown = reprlib.repr(name)
        if "than any model has" in str(error):
            raise ScoreError(f"{path} names {shown}, more heads than any model has; the file is broken.") from error
        raise ScoreError(f'{path} names the head {shown}; expected "layer-head", such as "13-18".') from error


def _layer(name: str, path: Path) -> int:
    # more digits than any model needs, which int() may refuse
    if not (name.isascii() and name.isdigit()) or len(name) > 6:
        raise ScoreError(f'{path} names the layer {reprlib.repr(name)}; expected a number, such as "13".')
    return int(name)


def _order(heads: Any, layer: str, path: Path) -> list[int]:
    if not isinstance(heads, list) or not heads or any(type(head) is not int or head < 0 for head in heads):
        raise ScoreError(f"{path} has {reprlib.repr(heads)} for layer {layer}; expected heads, best first: [3, 0, 1].")
    if max(heads) > MAX_INDEX:
        raise ScoreError(f"{path} names H{shortened(str(max(heads)))}, more heads than any model has; it is broken.")
    if len(set(heads)) < len(heads):
        raise ScoreError(f"{path} names a head of layer {layer} twice; expected each once, best first.")
    return heads


def _layout(heads: HeadSet, layout: HeadLayout | None, path: Path) -> HeadLayout:
    """The given layout, if the heads are in it, or the smallest that holds them."""
    if layout is None:
        layers, per_layer = max(head.layer for head in heads) + 1, max(head.head for head in heads) + 1
        if layers * per_layer > _MAX_HEADS:
            raise ScoreError(
                f"{path} names L{layers - 1} and H{per_layer - 1}, more heads than any model has; the file is broken."
            )
        return HeadLayout(layers, per_layer, per_layer)
    try:
        layout.check(heads)
    except HeadError as error:
        raise ScoreError(f"{path} is of another model: {error}") from error
    return layout


def _numbers(values: Any, key: str, path: Path) -> list[float]:
    values = values if isinstance(values, list) else [values]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _MAX_SCORE:
            raise ScoreError(f'{path} has {reprlib.repr(value)} among the scores of "{key}"; expected numbers.')
    return [float(value) for value in values]


def _row(line: str, number: int, path: Path) -> list[float]:
    try:
        row = [float(cell) for cell in line.strip().split("\t")]
    except ValueError as error:
        reason = shortened(str(error), 100)
        raise ScoreError(f"row {number} of {path} is not numbers separated by tabs ({reason}).") from error
    if not all(map(math.isfinite, row)):
        raise ScoreError(f"row {number} of {path} holds a value that is not finite; expected gates.")
    return row
