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
from interp.hooks.model.context import set_context_length
from interp.hooks.model.origin import set_origin
from interp.models.demo import DEMO_NOTE, DEMO_TITLE, FOLDER_NAME, demo_folder
from interp.models.gguf_header import read_gguf_header
from interp.models.model_files import (
    HUB_PATTERNS,
    PICKLED_INDEX,
    PICKLED_WEIGHTS,
    SAFE_INDEX,
    SAFE_WEIGHTS,
    TOKENIZER_FILES,
    alone,
    check_folder,
    check_report,
    check_sizes,
    indexed_names,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DEMO_NAME = "demo"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
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
    max_length: int | None = None,
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
        max_length: Number of tokens that prompts and replies may have; None for the context that the config states,
            stretched where its RoPE is.

    Returns:
        LoadedModel: the model in eval mode, and its tokenizer, None for a folder without one.

    Raises:
        ModelError: If the model does not exist, is not a causal language model, or its weights do not fit its config.
        UsageError: If `device`, `dtype`, `revision` or `max_length` is not valid.
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
        # a folder of that name elsewhere may hold any model
        if source.absolute() == cache_folder() / FOLDER_NAME:
            set_origin(model, DEMO_TITLE, f"{DEMO_NOTE}; {BENCHMARKS}")
    else:
        model, tokenizer = _from_gguf(source, options)
    if max_length is not None:
        set_context_length(model, max_length)
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

    safe = check_folder(folder, allow_pickle)
    local = SAFE_OPTIONS | {"local_files_only": True}
    with _loading_errors(folder):
        config = _check_causal(AutoConfig.from_pretrained(folder, **local), folder)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, config=config, use_safetensors=safe, output_loading_info=True, **local | options
        )
    model = check_report(loaded, folder)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        log.warning("%s has no tokenizer, so prompts must be given as token ids", folder)
        return model, None
    with _loading_errors(f"the tokenizer of {folder}"):
        return model, _tried(AutoTokenizer.from_pretrained(folder, **local))


def _from_gguf(file: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    header = read_gguf_header(file)
    # transformers would take config, tokenizer and chat template from files next to it
    with alone(file) as only:
        where = SAFE_OPTIONS | {"gguf_file": only.name, "local_files_only": True}
        with _loading_errors(file):
            config = AutoConfig.from_pretrained(only.parent, **where)
            check_sizes(config.to_dict(), len(header.tensors), header.n_elements, file)
            _check_causal(config, file)
            loaded = AutoModelForCausalLM.from_pretrained(only.parent, output_loading_info=True, **where | options)
        model = check_report(loaded, file)
        model.config._name_or_path = str(file)
        set_origin(model, file.stem, f"The weights were dequantised from {file.name}; {BENCHMARKS}")
        if "tokenizer.ggml.tokens" not in header.metadata:
            log.warning("%s has no tokenizer, so prompts must be given as token ids", file)
            return model, None
        with _loading_errors(f"the tokenizer of {file}"):
            tokenizer = _tried(AutoTokenizer.from_pretrained(only.parent, **where))
    tokenizer.name_or_path = str(file)
    return model, tokenizer


def _from_hub(name: str, revision: str | None, allow_pickle: bool, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = f"{name} (Hugging Face hub)"
    with _loading_errors(source):
        folder = _downloaded(name, revision, allow_pickle)
        safe = check_folder(folder, allow_pickle)
        # what was checked is what is read: the files of one commit, without further requests
        where = SAFE_OPTIONS | {"revision": folder.name, "local_files_only": True}
        config = _check_causal(AutoConfig.from_pretrained(name, **where), name)
        loaded = AutoModelForCausalLM.from_pretrained(
            name, config=config, use_safetensors=safe, output_loading_info=True, **where | options
        )
        return check_report(loaded, name), _tried(AutoTokenizer.from_pretrained(name, **where))


def _tried(tokenizer: Any) -> Any:
    """The tokenizer, after a use: entries of its files that have wrong types fail only then."""
    tokenizer.decode(tokenizer("a b")["input_ids"])
    tokenizer.convert_ids_to_tokens(tokenizer.all_special_ids)
    return tokenizer


def _downloaded(name: str, revision: str | None, allow_pickle: bool) -> Path:
    """The folder of a hub model in the cache of the hub, with the files that are read and no others."""
    from huggingface_hub import snapshot_download

    small = [*HUB_PATTERNS, "additional_chat_templates/*.jinja"]
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=small, ignore_patterns=["*/*.*n"]))
    kinds = [(SAFE_WEIGHTS, SAFE_INDEX)] + ([(PICKLED_WEIGHTS, PICKLED_INDEX)] if allow_pickle else [])
    for whole, index in kinds:
        wanted = indexed_names(folder / index) if (folder / index).exists() else [whole]
        snapshot_download(name, revision=folder.name, allow_patterns=wanted)
        if any((folder / each).exists() for each in wanted):
            break
    return folder


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
