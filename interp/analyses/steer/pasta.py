"""PASTA: what a user marks is kept, all other keys of the prompt are attended less."""

import math
from dataclasses import dataclass

from interp.errors import UsageError
from interp.hooks.edit.edit import EditContext, SpanEdit, check_positive
from interp.kernels.contract import Call


@dataclass(frozen=True)
class Pasta(SpanEdit):
    """Post-hoc attention steering of marked spans.

    pattern'[b h q k] = pattern / C on the span and alpha pattern / C off it, C the sum of both: a bias of log alpha on
    keys off the span. Several spans count as one set. Generated keys stay neutral, as in the authors' code; the paper's
    rule, which counts them as off the span, is scope="all".
    spans: names, positions or ranges; alpha > 0, 0.01 in the paper, 1 changes nothing; mode "exclude" lowers what is
    off the span, "include" raises the span by 1 / alpha, the same but for generated keys, which then are beside the
    rest of the prompt; protect_first leaves the first token, where most heads rest, as it was.
    A prompt that ends before a range of positions is not changed; one without a named span is an error.
    Source: Zhang et al. 2311.02262, equation 2. Differs: spans are united before they are biased, where the released
    code adds the bias once for each.
    Cannot show: which heads to steer; all of them at once is usually worse than none.
    """

    alpha: float = 0.01
    mode: str = "exclude"
    scope: str = "prompt"
    protect_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("alpha", self.alpha)
        if self.scope not in ("prompt", "all", "generated"):
            raise UsageError(f"scope={self.scope!r} is none: take 'prompt', 'all' or 'generated'.")
        if self.mode not in ("exclude", "include"):
            raise UsageError(f"mode={self.mode!r} is none: take 'exclude' or 'include'.")

    @property
    def is_noop(self) -> bool:
        return self.alpha == 1

    @property
    def leaves_prefix_unchanged(self) -> bool:
        # a row that sees no key of the span has one bias on all it sees
        return self.mode == "include" or (not self.protect_first and self.scope != "generated")

    def apply(self, here: EditContext) -> Call:
        marked = here.keys(self.spans)
        if self.mode == "include":
            return here.add_key_bias(-math.log(self.alpha), marked)
        # asked of the prompt: a cache may have dropped the span, and an earlier chunk not come to it yet
        off = here.prompt_keys(self.scope) & ~marked & here.has_span(self.spans)[:, None]
        return here.add_key_bias(math.log(self.alpha), off & ~here.first_token if self.protect_first else off)
