"""Whether interp reads a model rightly, by a real run on a few random tokens; what fails says why and what to do."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from interp.errors import InterpError
from interp.hooks.doctor.checks import CHECKS, Check, ModelUnderTest
from interp.hooks.model.layers import unwrap

STATUS_MARKS = {True: "ok", False: "FAIL", None: "-"}


@dataclass(frozen=True)
class CheckResult:
    """One finding: ok is None for a fact that cannot be wrong, or where the check did not apply."""

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found; str() is a table."""

    model: str
    checks: tuple[CheckResult, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(check.name for check in self.checks if check.ok is False)

    def __getitem__(self, name: str) -> CheckResult:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        wide = max(len(check.name) for check in self.checks)
        rows = [f"{STATUS_MARKS[check.ok]:<4s}  {check.name:<{wide}s}  {check.detail}" for check in self.checks]
        last = "all checks passed" if self.ok else f"{len(self.failed)} of {len(rows)} checks failed"
        return "\n".join([self.model, *rows, last])


def doctor(model: nn.Module, tokenizer: Any = None) -> Diagnosis:
    """Run a model on two short prompts of random tokens and say what interp can rely on.

    Checks: every layer reached; logits equal to the bit with an idle seam and close to it while reading; rows of
    attention sum to one less the learned sink; padding and cached generation change nothing; the config's layout and
    windows are those of the attention calls. Tolerances go by dtype: float32 shows most. Never raises for what it
    finds, and leaves nothing on the model. Cannot show that a model is right, only that reading does not change it.
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
        return CheckResult(name, False, str(error))
    except Exception as error:  # a model may fail in any way, and that is a finding
        return CheckResult(
            name, False, f"the model raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        )
