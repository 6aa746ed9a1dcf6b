"""Compatibility checks of a model, by running it on a few random tokens."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from interp.errors import InterpError
from interp.hooks.doctor.checks import CHECKS, Check, ModelUnderTest
from interp.hooks.model.layers import unwrap
from interp.hooks.model.portable import portable_text

STATUS_MARKS = {True: "ok", False: "FAIL", None: "-"}


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Examples:
        >>> interp.doctor(model)["soft-cap"].detail
        'none'
    """

    name: str
    """Name of the check."""
    ok: bool | None
    """Whether the model passed; None for a fact that cannot be wrong, and where the check did not apply."""
    detail: str
    """The reason, and for a failed check the remedy."""


@dataclass(frozen=True)
class Diagnosis:
    """The results of all checks of `doctor`; str() gives a table.

    Examples:
        >>> found = interp.doctor(model, tokenizer)
        >>> found.ok, found.failed
        (True, ())
        >>> found["heads"].detail
        '2 layers of 4 query heads over 2 kv heads of dimension 16'
    """

    model: str
    """Class name of the model."""
    checks: tuple[CheckResult, ...]
    """The results in the order of the checks."""

    @property
    def ok(self) -> bool:
        """Whether no check has failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that have failed."""
        return tuple(check.name for check in self.checks if check.ok is False)

    def __getitem__(self, name: str) -> CheckResult:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict of JSON values.

        Examples:
            >>> sorted(interp.doctor(model).to_dict())
            ['checks', 'model', 'ok']
        """
        return {"model": self.model, "ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        wide = max(len(check.name) for check in self.checks)
        rows = [f"{STATUS_MARKS[check.ok]:<4s}  {check.name:<{wide}s}  {check.detail}" for check in self.checks]
        last = "all checks passed" if self.ok else f"{len(self.failed)} of {len(rows)} checks failed"
        return "\n".join([self.model, *rows, last])


def doctor(model: nn.Module, tokenizer: Any = None) -> Diagnosis:
    """Check whether interp reads and edits a model correctly, by running it on two short prompts of random tokens.

    The checks are:

    - interp receives the attention calls of every layer;
    - logits are identical to the bit while nothing is read, and within the tolerance while attention is read;
    - attention rows sum to one, less the share of a learned sink;
    - padding and cached generation do not change the results;
    - the head layout and the sliding windows of the config are those of the attention calls;
    - the tokenizer gives character offsets and belongs to the model.

    The tolerances depend on the dtype; float32 reveals the smallest errors. A failed check does not raise an error, and
    the model is left unchanged.

    Args:
        model: A transformers causal language model, or a TransformerBridge over one.
        tokenizer: Its tokenizer.

    Returns:
        Diagnosis: the result of each check, with its reason and remedy.

    Examples:
        >>> print(interp.doctor(model, tokenizer))
        LlamaForCausalLM
        -     attention      sdpa, float32 on cpu
        ok    seam           all 2 layers are reached
        ...
        all checks passed

    Limits:
        Does not show that the model is correct, only that reading does not change it.
    """
    model = unwrap(model)
    subject = ModelUnderTest(model, tokenizer)
    with _eval_mode(model), torch.no_grad():
        checks = tuple(_run_check(subject, name, check) for name, check in CHECKS.items())
    return Diagnosis(type(model).__name__, checks)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _run_check(subject: ModelUnderTest, name: str, check: Check) -> CheckResult:
    try:
        return CheckResult(name, *check(subject))
    except InterpError as error:
        return CheckResult(name, False, portable_text(str(error)))
    except Exception as error:  # a model may fail in any way, which is a result of the check
        return CheckResult(
            name, False, f"the model raised {type(error).__name__}: {portable_text(' '.join(str(error).split()))[:200]}"
        )
