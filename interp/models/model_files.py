"""The files of a model folder: which ones are read, and what they must hold before a library reads them.

Loading is by allow-list. A file that is not named here is never opened, a type of weights or a method of quantisation
that is not known is an error, and so are weights that the model does not use.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from interp.errors import ModelError
from interp.hooks.limits import MB, check_regular, parse_json, read_text, shortened

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
SAFE_WEIGHTS, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_WEIGHTS, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
HUB_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""files of a hub repository that are downloaded next to the weights"""
MAX_CONFIG_BYTES = 64 * MB
FLOATS = ("F64", "F32", "F16", "BF16")
"""types of weights without quantisation, in the words of safetensors"""
BUFFERS = re.compile(
    r"(^|\.)(inv_freq|cos_cached|sin_cached|masked_bias|position_ids|num_batches_tracked|(attn|attention)\.bias)$"
)
"""tensors that old versions stored and that hold no weight"""
OTHER_PARTS = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|audio_tower|audio_model|multi_modal_projector|embed_vision|embed_audio|mtp)\."
)
"""parts of a checkpoint for images, sound or several tokens at once, which a language model does without"""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIZES = re.compile(
    r"(hidden|intermediate|inner|vocab|embedding|head)_(size|dim)|d_model|n_embd|n_inner|n_head|num_.*heads"
)
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
MAX_POSITIONS = 1 << 27
MAX_QUADRATIC_POSITIONS = 1 << 15
QUADRATIC = ("gpt_neo", "gpt_bigcode")
"""families whose models hold a table of positions times positions"""
MAX_EXPERTS = 1 << 13
SMALLEST_SIZE = 1 << 20
"""sizes up to this are not compared with the weights"""


def check_folder(folder: Path, allow_pickle: bool) -> bool:
    """Check the files of a model folder.

    Args:
        folder: The folder.
        allow_pickle: Whether pickled weights may be read.

    Returns:
        Whether the weights are safetensors.

    Raises:
        ModelError: If the config or the weights are missing, pickled, outside of the folder, of a type or a method of
            quantisation that is not known, or do not go with each other.
    """
    if not (folder / CONFIG).exists():
        raise ModelError(_without_config(folder))
    if (folder / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"{folder} holds an adapter as well ({ADAPTER_CONFIG}), so it is not clear which model is meant; load the "
            "base model and add the adapter with peft, or move the files of the adapter to another folder."
        )
    config = _object(folder / CONFIG)
    for path in (folder / name for name in (*TOKENIZER_FILES, "generation_config.json", "chat_template.jinja")):
        if path.exists():
            check_regular(path, ModelError)
    files = weight_files(folder, allow_pickle)
    named = config.get("transformers_weights")
    if named is not None and named not in (SAFE_WEIGHTS, SAFE_INDEX):
        raise ModelError(f"{folder / CONFIG} names the weights {named!r}; name them {SAFE_WEIGHTS} and leave this out.")
    if files[0].suffix != ".safetensors":
        return False
    method = quantisation(config, folder)
    n_tensors, n_elements = 0, 0
    for path in files:
        for name, (kind, size) in _tensors(path).items():
            n_tensors, n_elements = n_tensors + 1, n_elements + size
            if method is None and kind not in FLOATS and not BUFFERS.search(name):
                raise ModelError(
                    f"{path} holds {shortened(name)!r} as {kind}, but {CONFIG} names no quantisation, so its scales "
                    "would not be applied; give the folder with its quantization_config, or weights in floating point."
                )
    check_sizes(config, n_tensors, n_elements, folder / CONFIG)
    return True


def _without_config(folder: Path) -> str:
    if (folder / ADAPTER_CONFIG).exists():
        return (
            f"{folder} holds an adapter and no model ({ADAPTER_CONFIG} without {CONFIG}); load its base model, add the "
            "adapter with peft, and give both to interp in Python, or merge and save them."
        )
    found = ", ".join(sorted(path.name for path in folder.glob("*.gguf")))
    hint = f"name the .gguf file instead ({found})" if found else "give a folder that save_pretrained has written"
    return f"{folder} has no {CONFIG}; {hint}."


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files of the weights of a model folder, all regular files inside of it.

    Args:
        folder: The folder.
        allow_pickle: Whether pickled weights may be read.

    Returns:
        All safetensors files, or, where there is none and `allow_pickle` is set, all pickled files.

    Raises:
        ModelError: If there is no such file, or an index names one that is missing, of another kind, or not in the
            folder.
    """
    for whole, index, suffix in ((SAFE_WEIGHTS, SAFE_INDEX, ".safetensors"), (PICKLED_WEIGHTS, PICKLED_INDEX, ".bin")):
        if suffix == ".bin" and not allow_pickle:
            break
        if (folder / whole).exists():
            check_regular(folder / whole, ModelError, None)
            return [folder / whole]
        if (folder / index).exists():
            return _indexed(folder, folder / index, suffix)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles and not allow_pickle:
        raise ModelError(
            f"{folder} has only pickled weights ({', '.join(pickles[:3])}), which can run code when they are read; "
            "convert them to safetensors, or pass allow_pickle=True if you trust them."
        )
    raise ModelError(
        f"{folder} has no weights; add {SAFE_WEIGHTS}, or {SAFE_INDEX} and the files that it names, of its {CONFIG}."
    )


def _indexed(folder: Path, index: Path, suffix: str) -> list[Path]:
    """The files that an index of weights names."""
    found = [folder / name for name in indexed_names(index)]
    for path in found:
        if path.suffix != suffix:
            raise ModelError(
                f"{index} names the file {path.name!r}, which is not a {suffix} file; convert the model to safetensors."
            )
        check_regular(path, ModelError, None)
    return found


def indexed_names(index: Path) -> list[str]:
    """The names of the files that an index of weights names.

    Args:
        index: The index.

    Raises:
        ModelError: If it is no index, or a name leads out of its folder.
    """
    stored = _object(index)
    named, metadata = stored.get("weight_map"), stored.get("metadata")
    if not isinstance(named, dict) or not named or not isinstance(metadata, dict):
        raise ModelError(f"{index} has no weight_map and metadata; download or convert the model again.")
    names = sorted(set(map(str, named.values())))
    for name in names:
        parts = PurePosixPath(name)
        inside = not parts.is_absolute() and ".." not in parts.parts and not PureWindowsPath(name).drive
        if not inside or "\\" in name or not name.isprintable():
            raise ModelError(f"{index} names the file {name!r}, which is not in its folder; convert the model again.")
    return names


def _tensors(path: Path) -> dict[str, tuple[str, int]]:
    """Type and number of elements of each tensor of a safetensors file, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), _product(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise ModelError(
            f"{path.parent} cannot be loaded: {path.name} is broken ({reason}); download it again."
        ) from error


def _product(shape: list[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def quantisation(config: Mapping[str, Any], source: Path) -> str | None:
    """The method of quantisation that a config names; None for weights that are not quantised.

    transformers leaves a method out that it does not know, and reads the integers as if they were weights.

    Args:
        config: The config as JSON.
        source: Where it is from, for errors.

    Raises:
        ModelError: If transformers does not know the method.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    inner = [part for name, part in config.items() if name.endswith("_config") and isinstance(part, dict)]
    for part in (config, *inner):
        for entry in ("quantization_config", "compression_config"):
            stored = part.get(entry)
            if not stored:
                continue
            method = stored.get("quant_method") if isinstance(stored, dict) else stored
            if isinstance(stored, dict) and (stored.get("load_in_8bit") or stored.get("load_in_4bit")):
                method = "bitsandbytes_4bit" if stored.get("load_in_4bit") else "bitsandbytes_8bit"
            if not isinstance(method, str) or method not in KNOWN or method == "gguf":
                known = ", ".join(sorted(name for name in KNOWN if name != "gguf"))
                raise ModelError(
                    f"{source} is quantised by {method!r}, which transformers cannot read; give weights in floating "
                    f"point, or quantised by one of {known}."
                )
            return method
    return None


def check_sizes(config: Mapping[str, Any], n_tensors: int, n_elements: int, source: object) -> None:
    """Refuse a config that describes more than its weights hold, before a model is made from it.

    Args:
        config: The config as JSON.
        n_tensors: Number of tensors in the files of the weights.
        n_elements: Number of their elements.
        source: Where the config is from, for errors.

    Raises:
        ModelError: If a number of layers, heads, positions or dimensions cannot be that of the weights.
    """
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for name, value in part.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            limit = _limit(name, str(part.get("model_type", "")), n_tensors, n_elements)
            if limit is not None and not value <= limit:
                raise ModelError(
                    f"{source} states {name}={shortened(str(value))}, and its {n_tensors:,} weight tensors of "
                    f"{n_elements:,} numbers allow at most {limit:,}; download or convert the model again."
                )


def _limit(name: str, family: str, n_tensors: int, n_elements: int) -> int | None:
    """The largest value of an entry of a config; None for entries that name no size."""
    if name in LAYERS:
        return n_tensors
    if name in POSITIONS:
        return MAX_QUADRATIC_POSITIONS if family in QUADRATIC else MAX_POSITIONS
    if "expert" in name:
        return max(MAX_EXPERTS, n_elements)
    return max(SMALLEST_SIZE, n_elements) if SIZES.search(name) else None


def check_report(loaded: Any, source: object) -> Any:
    """The model, if its files hold all its weights and no others.

    transformers fills missing weights with random numbers, and leaves out others without an error.

    Args:
        loaded: The pair that `from_pretrained` returns with `output_loading_info`.
        source: Where the model is from, for errors.

    Raises:
        ModelError: If weights are missing, of another shape, or left over.
    """
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source} lacks {len(missing)} weights that its config describes, such as {missing[0]}; download or "
            "convert the model again."
        )
    if other := sorted(map(str, report.get("mismatched_keys") or ())):
        raise ModelError(
            f"{source} has weights of other shapes than its config, such as {other[0]}; download it again."
        )
    known = (BUFFERS, OTHER_PARTS)
    unused = [key for key in sorted(report["unexpected_keys"]) if not any(form.search(key) for form in known)]
    if unused:
        raise ModelError(
            f"{source} has {len(unused)} weights that {type(model).__name__} does not use, such as "
            f"{shortened(unused[0])}; the model would not be the one that was stored, so convert it again."
        )
    return model


@contextlib.contextmanager
def alone(file: Path) -> Iterator[Path]:
    """A temporary folder that holds nothing but a link to one file, so that no neighbour of it is read.

    Args:
        file: The file.

    Yields:
        Path: The file in the temporary folder.
    """
    with tempfile.TemporaryDirectory(prefix="interp-", ignore_cleanup_errors=True) as folder:
        only = Path(folder) / file.name
        try:
            only.symlink_to(file.resolve())
        except (OSError, NotImplementedError):
            # Windows asks for a permission
            try:
                os.link(file, only)
            except OSError:
                shutil.copyfile(file, only)
        yield only


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        stored = parse_json(read_text(path, ModelError, MAX_CONFIG_BYTES))
    except ValueError as error:
        raise ModelError(f"{path} cannot be loaded: it is not JSON ({error}); download it again.") from error
    if not isinstance(stored, dict):
        raise ModelError(f"{path} holds a {type(stored).__name__}, not an object; download it again.")
    return stored
