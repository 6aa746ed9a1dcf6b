"""Controls that declarations name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Control:
    """A placeholder of the controls that analyses declare."""

    title: str
    span: str | None = None
    n_tokens: int | None = None


def answers() -> Control:
    """Ablate the top heads and count right answers to needle prompts."""
    return Control("answers")


def logit_difference() -> Control:
    """Ablate the top heads and measure the logit difference."""
    return Control("logit difference")


def loss(span: str | None = None, n_tokens: int | None = None) -> Control:
    """Ablate the top heads and measure the loss."""
    return Control("loss", span, n_tokens)
