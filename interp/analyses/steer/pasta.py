"""PASTA: the keys outside of a marked span get less attention."""

import math
from dataclasses import dataclass

from interp.analyses.registry import edit
from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext, SpanEdit, check_positive
from interp.kernels.contract import Call


@edit(title="PASTA", group="spans", order=1)
@dataclass(frozen=True)
class Pasta(SpanEdit):
    """Attention to keys outside of the marked spans is multiplied by `alpha`, then each row is renormalised.

    Post-hoc attention steering multiplies `pattern[b h q k]` by `alpha` on the keys outside of the marked spans, and
    divides the row by its new sum. This equals adding `log alpha` to the attention logits (before the softmax) of those
    keys. By default this lowers only the attention to keys of the prompt, see `scope`. Several spans count as one set.

    Where a span is given by positions, a prompt that is too short to have any of them is unchanged. Where it is given
    by name, a prompt without it is an error.

    Args:
        spans: Names, positions or ranges of the spans.
        alpha: Factor of the attention to keys outside of the marked spans, above 0. The paper uses 0.01; 1 changes
            nothing.
        mode: "exclude" lowers the attention to keys outside of the marked spans. "include" multiplies attention to the
            spans by `1 / alpha` instead, before the row is renormalised; it ignores `scope` and `protect_first`. In a
            model without learned sinks it equals "exclude" with `scope="all"` and `protect_first=False`.
        scope: Keys to which "exclude" lowers the attention. "prompt": those of the prompt outside of the spans, as in
            the authors' code, which leaves generated keys unchanged. "all": the paper's rule, which counts generated
            keys as outside of the spans. "generated": every key of the prompt, the spans included, so that generated
            keys gain attention; this is the mode "generation" of the authors' code.
        protect_first: Do not lower the attention to the first token, which many heads use as an attention sink.
        heads: Heads to edit.

    Raises:
        UsageError: If a setting is out of range.

    Examples:
        >>> edit = interp.steer.Pasta("first", alpha=0.1, heads="L0H1 L1H2")
        >>> with interp.steering(model, edit, prompts):
        ...     logits = model(**prompts.tensors()).logits

    Source:
        Zhang et al. 2311.02262, equation 2.

    Differs:
        Several spans are merged first, so that `log alpha` is added once to each key outside of all of them. The
        released code adds it separately for each span.

    Limits:
        Does not show which heads to steer. Steering all of them at once can be much worse than no steering:
        Qwen2.5-Coder-1.5B then gets none of 20 JSON items right.
    """

    alpha: float = 0.01
    mode: str = "exclude"
    scope: str = "prompt"
    protect_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("alpha", self.alpha)
        if self.scope not in ("prompt", "all", "generated"):
            raise UsageError(f"unknown scope {self.scope!r}; choose from 'prompt', 'all', 'generated'.")
        if self.mode not in ("exclude", "include"):
            raise UsageError(f"unknown mode {self.mode!r}; choose from 'exclude', 'include'.")

    @property
    def is_noop(self) -> bool:
        return self.alpha == 1

    @property
    def leaves_prefix_unchanged(self) -> bool:
        # a row that sees no key of the span has one bias on all it sees
        return self.mode == "include" or not self.protect_first

    def apply(self, here: EditContext) -> Call:
        marked = here.keys(self.spans)
        if self.mode == "include":
            return here.add_key_bias(-math.log(self.alpha), marked)
        # the prompt decides, not the keys: a cache may have dropped the span, and an earlier chunk not reached it yet
        if self.scope == "generated":
            off = here.prompt_keys()
        else:
            off = here.prompt_keys(self.scope) & ~marked
        off = off & here.has_span(self.spans)[:, None]
        return here.add_key_bias(math.log(self.alpha), off & ~here.first_token if self.protect_first else off)
