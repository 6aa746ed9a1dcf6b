"""Provenance of a result: the model, tokenizer, software versions and command that produced it."""

import platform
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from interp.errors import ScoreError
from interp.hooks.model.bos import bos_rule
from interp.hooks.model.chat_template import date_note
from interp.hooks.model.fingerprint import UNKNOWN, config_hash, innermost, template_hash, tokenizer_hash, weights_hash
from interp.hooks.model.origin import origin_of
from interp.hooks.model.portable import portable_command, portable_model, portable_text
from interp.hooks.model.weights import compute_dtype, input_device
from interp.kernels.select import usual

_PACKAGES = ("interp", "torch", "transformers", "tokenizers", "transformer-lens", "triton", "numpy")


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
    """Fingerprint of a sample of each weight and buffer that acts (at most 4,096 values) in its stored dtype, or
    "unknown" where the values cannot be read. The same weights in another dtype have another hash, and an edit of
    values outside the sample does not change it."""
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
        given, model = model, innermost(model)
        config = model.config
        loaded = portable_model(str(getattr(config, "_name_or_path", "") or ""))
        origin = origin_of(model)
        notes = (origin.note, date_note(tokenizer), note)
        return cls(
            model=portable_model(origin.name) or loaded,
            architecture=type(model).__name__,
            config_hash=config_hash(config),
            weights_hash=weights_hash(given),
            tokenizer_hash=tokenizer_hash(tokenizer),
            template_hash=template_hash(tokenizer),
            bos=bos_rule(tokenizer),
            versions=_versions(),
            seed=seed,
            dtype=str(compute_dtype(model)).removeprefix("torch."),
            device=_device(input_device(model)),
            backend=backend or f"{config._attn_implementation} + {usual(input_device(model))}",
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
        """Whether architecture, config and weights are the same.

        Args:
            other: Another provenance.

        Returns:
            True for the same model in the same dtype. Unknown weights are never the same.

        Examples:
            >>> from interp.hooks.model.provenance import Provenance
            >>> scores.provenance.same_model(Provenance.of(model))
            True
        """
        mine, others = ((each.architecture, each.config_hash, each.weights_hash) for each in (self, other))
        return UNKNOWN not in mine and mine == others

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
        if UNKNOWN in (self.weights_hash, other.weights_hash):
            raise ScoreError(
                f"the weights of {self._describe()} or of {other._describe()} cannot be read, so that nothing shows "
                "whether they are one model; load the model into memory, in a form whose weights can be read."
            )
        if not self.same_model(other):
            raise ScoreError(
                f"these scores belong to {self._describe()}, but the model given is {other._describe()}; "
                "load the model of the scores in its dtype, or compute the scores again."
            )

    def _describe(self) -> str:
        prints = f"config {self.config_hash}, weights {self.weights_hash}"
        return f"{self.model or self.architecture} ({', '.join(part for part in (self.dtype, prints) if part)})"


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
