"""Number and length of the prompts of a run, in a module that loads without torch, for the command line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from string import Formatter
from typing import Any, TypeVar

from interp.errors import UsageError
from interp.hooks.limits import check_counts

T = TypeVar("T", bound=Callable[..., Any])
REPLY_TOKENS = 32
"""default number of new tokens of a reply, of every analysis and test that lets the model reply"""


MAX_PROMPTS = 100_000
"""largest number of prompts of a kind"""
LENGTHS = ("needle_length", "long_length", "text_length", "check_length", "n_repeated")
"""sizes that are numbers of tokens"""
SHORTEST_SWEEP = 256
"""smallest number of tokens of a needle sweep, where the user gives none"""


def doubling(longest: int) -> tuple[int, ...]:
    """Lengths that double from 256 tokens, up to the longest one, which is always there.

    Args:
        longest: Largest number of tokens.
    """
    lengths = [SHORTEST_SWEEP]
    while 2 * lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    return (*(length for length in lengths if length < longest), longest)


@dataclass(frozen=True, kw_only=True)
class PromptSizes:
    """Number and length of the prompts of a run.

    Args:
        seed: Seed of prompts, random head sets and confidence intervals.
        n_needles: Number of needle prompts: long texts that hide a made-up fact, with a question about it.
        needle_length: Number of tokens of a needle prompt, at most.
        needle_depths: Depths of the needle, as fractions of the text.
        long_length: Number of tokens of the needle prompts of analyses that choose a fixed number of keys, such as
            task_kv; it has to be much larger than that number.
        haystack: Folder of texts (.txt, .md or .rst) in which needles are hidden; by default prose from a grammar.
        reply_tokens: Number of new tokens of a reply to a needle prompt, at most, also in ablation tests.
        n_texts: Number of plain texts. It is also the number of prompts of repeated tokens. The analysis kv uses this
            number of prompts in each of its three tasks.
        text_length: Number of tokens of a plain text.
        n_repeated: Number of random tokens that are repeated.
        n_pairs: Number of pairs of prompts for patching and for methods that contrast two kinds of prompts.
        n_few_shot: Number of few-shot prompts of function vectors, over all relations.
        sweep_lengths: Numbers of tokens of the needle sweep; by default they double from 256 to the model's context.
        n_sweep: Number of needle prompts of each length and depth of the needle sweep.
        n_check_needles: Largest number of needle prompts in an ablation test. Twice this number are drawn, and only
            those that the unmodified model answers right are used.
        check_length: Number of tokens of a needle prompt of an ablation test, at most.
        training_steps: Number of optimisation steps of a method that trains, such as DuoAttention.
        explorer_tokens: Number of tokens of the text in the explorer, at most; 0 for no explorer.

    Raises:
        UsageError: If a number is too small, or a depth is not between 0 and 1.

    Examples:
        >>> sizes = interp.tasks.standard.PromptSizes(n_needles=4)
        >>> sizes.n_needles, sizes.needle_length
        (4, 320)
    """

    seed: int = 0
    n_needles: int = 16
    needle_length: int = 320
    needle_depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    long_length: int = 768
    haystack: str = ""
    reply_tokens: int = REPLY_TOKENS
    n_texts: int = 12
    text_length: int = 256
    n_repeated: int = 50
    n_pairs: int = 16
    n_few_shot: int = 28
    sweep_lengths: tuple[int, ...] = ()
    n_sweep: int = 2
    n_check_needles: int = 10
    check_length: int = 192
    training_steps: int = 100
    explorer_tokens: int = 1024

    def __post_init__(self) -> None:
        check_counts(vars(self))
        for name in (field.name for field in fields(self)):
            if name in ("seed", "needle_depths", "haystack", "sweep_lengths", "explorer_tokens"):
                continue
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is too small; give a number of at least 1.")
            if name.startswith("n_") and getattr(self, name) > MAX_PROMPTS:
                raise UsageError(f"{name}={getattr(self, name):,} is too large; give at most {MAX_PROMPTS:,}.")
        if self.explorer_tokens < 0:
            raise UsageError(
                f"explorer_tokens={self.explorer_tokens} is negative; give the length of the explorer's text, "
                "or 0 for no explorer."
            )
        if min(self.sweep_lengths, default=1) < 1:
            raise UsageError(f"sweep_lengths={self.sweep_lengths} has a length below 1; give numbers of tokens.")
        if not self.needle_depths or not all(0 <= depth <= 1 for depth in self.needle_depths):
            raise UsageError(
                f"needle_depths={self.needle_depths} has a depth outside of the text; give numbers between 0 and 1."
            )


def described(words: str) -> Callable[[T], T]:
    """Declare in words which prompts a function of sizes and tokenizer makes.

    Args:
        words: The prompts, with each field of `PromptSizes` that changes them in braces.
    """

    def mark(maker: T) -> T:
        maker.__dict__["described"] = words
        return maker

    return mark


def sizes_used(maker: Any) -> set[str] | None:
    """The fields of `PromptSizes` that the description of a function names; None for one without a description."""
    words = getattr(maker, "described", None)
    return None if words is None else {name for _, name, _, _ in Formatter().parse(words) if name}


def description(maker: Any, sizes: Mapping[str, Any]) -> str:
    """The prompts that a function makes of these sizes, in words; empty where a size or the description is missing.

    Args:
        maker: A function of sizes and tokenizer.
        sizes: Fields of `PromptSizes`.
    """
    used = sizes_used(maker)
    if used is None or not used.issubset(sizes):
        return ""
    return str(maker.described).format(**{name: _in_words(sizes[name]) for name in used})


def _in_words(value: Any) -> str:
    if isinstance(value, list | tuple):
        *first, last = [_in_words(each) for each in value] or ["those of the model"]
        return f"{', '.join(first)} and {last}" if first else last
    return f"{value:,}" if isinstance(value, int) else str(value)
