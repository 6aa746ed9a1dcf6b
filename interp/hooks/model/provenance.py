"""Provenance of a result: the model, tokenizer, software versions and command that produced it."""

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from interp.errors import ScoreError
from interp.hooks.model.bos import bos_rule
from interp.hooks.model.chat_template import date_note
from interp.hooks.model.origin import origin_of
from interp.hooks.model.portable import portable_command, portable_model, portable_text
from interp.kernels.select import usual

_SAMPLE_SIZE = 4096
_PACKAGES = ("interp", "torch", "transformers", "tokenizers", "transformer-lens", "triton", "numpy")
# entries of a config about storage and run settings, which do not change the computation of the model
_RUN_SETTINGS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "interp_note", "interp_name", "_attn_implementation", "attn_implementation",
    "_attn_implementation_internal", "_attn_implementation_autoset",
}  # fmt: skip


@dataclass(frozen=True)
class Provenance:
    """The origin of a result.

    A hash is the first 16 hexadecimal digits of a SHA-256, and "" where there was nothing to hash.

    Examples:
        >>> scores.provenance.architecture
        'LlamaForCausalLM'
        >>> len(scores.provenance.weights_hash)
        16
    """

    model: str
    """Hub id, or the last part of the folder that the model was loaded from."""
    architecture: str
    """Class name of the model."""
    config_hash: str
    """Fingerprint of the entries of the config that determine the computation."""
    weights_hash: str
    """Fingerprint of a sample of each parameter (at most 4,096 values) in its stored dtype. The same weights in another
    dtype have another hash, and an edit of values outside the sample does not change it."""
    tokenizer_hash: str = ""
    """Fingerprint of the vocabulary, merges and processing of the tokenizer."""
    template_hash: str = ""
    """Fingerprint of the chat template."""
    bos: str = ""
    """First token of texts and of chats, and whether a setting changed the rule of the tokenizer."""
    versions: dict[str, str] = field(default_factory=dict, hash=False)
    """Versions of Python and of the packages that affect results."""
    seed: int = 0
    """Seed of the random draws."""
    dtype: str = ""
    """Data type of the parameters."""
    device: str = ""
    """Device of the model, with the name of the GPU."""
    backend: str = ""
    """Attention implementation of the model, and the engine that reads attention."""
    command: str = ""
    """The command line, with each local path cut to its last part."""
    time: str = ""
    """Time of creation in UTC, ISO 8601, to the second."""
    note: str = ""
    """Remarks about the model or the result, separated by semicolons."""

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None, *, seed: int = 0, backend: str = "", note: str = "") -> "Provenance":
        """Record the provenance of a result that is made now.

        Args:
            model: A transformers causal language model, a compiled one, or a TransformerBridge over one.
            tokenizer: The tokenizer of the prompts.
            seed: Seed of the random draws.
            backend: Attention backend; by default the attention implementation of the model and the usual engine.
            note: A remark to store with the result.

        Returns:
            The provenance.

        Examples:
            >>> from interp.hooks.model.provenance import Provenance
            >>> Provenance.of(model, tokenizer, seed=3).seed
            3
        """
        model = _unwrap(model)
        config = model.config
        first = next(model.parameters())
        loaded = portable_model(str(getattr(config, "_name_or_path", "") or ""))
        origin = origin_of(model)
        notes = (origin.note, date_note(tokenizer), note)
        return cls(
            model=portable_model(origin.name) or loaded,
            architecture=type(model).__name__,
            config_hash=config_hash(config),
            weights_hash=weights_hash(model),
            tokenizer_hash=tokenizer_hash(tokenizer),
            template_hash=template_hash(tokenizer),
            bos=bos_rule(tokenizer),
            versions=_versions(),
            seed=seed,
            dtype=str(first.dtype).removeprefix("torch."),
            device=_device(first.device),
            backend=backend or f"{config._attn_implementation} + {usual(first.device)}",
            command=portable_command(sys.argv, {loaded}),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            note=portable_text("; ".join(part for part in notes if part)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict of JSON values.

        Examples:
            >>> scores.provenance.to_dict()["dtype"]
            'float32'
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Provenance":
        """Restore a provenance from the result of `to_dict`.

        Args:
            stored: The stored entries; unknown entries, as of later versions, are ignored.

        Returns:
            The provenance.

        Raises:
            ScoreError: If an entry is missing or has the wrong type.

        Examples:
            >>> from interp.hooks.model.provenance import Provenance
            >>> Provenance.from_dict(scores.provenance.to_dict()) == scores.provenance
            True
        """
        if not isinstance(stored, Mapping):
            raise ScoreError(
                f"the provenance is of type {type(stored).__name__}, not a table of named entries; the file is broken."
            )
        known: dict[str, Any] = {}
        for entry in fields(cls):
            if entry.name not in stored:
                if entry.default is MISSING and entry.default_factory is MISSING:
                    raise ScoreError(f'the provenance has no entry "{entry.name}"; the file is broken.')
                continue
            value = stored[entry.name]
            kind = {"seed": int, "versions": dict}.get(entry.name, str)
            if not isinstance(value, kind):
                raise ScoreError(
                    f'"{entry.name}" of the provenance is {value!r}, not of type {kind.__name__}; the file is broken.'
                )
            known[entry.name] = value
        return cls(**known)

    def same_model(self, other: "Provenance") -> bool:
        """Whether config and weights have the same hashes.

        Args:
            other: Another provenance.

        Returns:
            True for the same model in the same dtype.

        Examples:
            >>> from interp.hooks.model.provenance import Provenance
            >>> scores.provenance.same_model(Provenance.of(model))
            True
        """
        return (self.config_hash, self.weights_hash) == (other.config_hash, other.weights_hash)

    def check_model(self, other: Any) -> None:
        """Check that another model is the one that this result was made with.

        Args:
            other: A model, or a Provenance.

        Raises:
            ScoreError: If config or weights differ; the message names both fingerprints.

        Examples:
            >>> scores.provenance.check_model(model)
        """
        other = other if isinstance(other, Provenance) else Provenance.of(other)
        if not self.same_model(other):
            raise ScoreError(
                f"these scores belong to {self._describe()}, but the model given is {other._describe()}; "
                "load the model of the scores in its dtype, or compute the scores again."
            )

    def _describe(self) -> str:
        prints = f"config {self.config_hash}, weights {self.weights_hash}"
        return f"{self.model or self.architecture} ({', '.join(part for part in (self.dtype, prints) if part)})"


def config_hash(config: Any) -> str:
    """Hash the entries of a config that determine the computation; names, versions and run settings are left out."""
    return _digest(json.dumps(_without_run_settings(config.to_dict()), sort_keys=True, default=str).encode())


def weights_hash(model: torch.nn.Module) -> str:
    """Hash the name, shape, dtype and a strided sample of the values of each parameter.

    The hash is the same in every process and on every device. Parameters without values (device "meta") enter with
    name, shape and dtype alone.
    """
    digest = hashlib.sha256()
    # a bridge inserts its own modules, which change the names of the parameters but not the parameters
    named = ((name.replace("_original_component.", ""), weight) for name, weight in model.named_parameters())
    for name, weight in sorted(named, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            digest.update(_sampled_bytes(weight.detach()))
    return digest.hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash the vocabulary, merges and processing; padding and truncation, which calls change, are left out."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    stored = backend.to_str()
    # the serialised form begins with padding and truncation, followed by the added tokens
    return _digest(stored[max(stored.find('"added_tokens"'), 0) :].encode())


def template_hash(tokenizer: Any) -> str:
    """Hash the chat template."""
    template = getattr(tokenizer, "chat_template", None)
    return _digest(json.dumps(template, sort_keys=True).encode()) if template else ""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _unwrap(model: Any) -> Any:
    """Return the model inside a bridge or a compiled wrapper."""
    for wrapper in ("original_model", "_orig_mod"):
        model = getattr(model, wrapper, model)
    return model


def _without_run_settings(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_run_settings(item) for key, item in value.items() if key not in _RUN_SETTINGS}
    return [_without_run_settings(item) for item in value] if isinstance(value, list | tuple) else value


def _sampled_bytes(weight: Tensor) -> bytes:
    flat = weight.reshape(-1)
    # an odd stride samples all columns of a matrix whose width is a power of two
    stride = -(-flat.numel() // _SAMPLE_SIZE) | 1
    return flat[::stride].contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
