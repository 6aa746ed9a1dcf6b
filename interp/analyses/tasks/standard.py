"""Standard prompts: how many prompts a run uses and how long they are, and one function for each set of prompts."""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

from interp.analyses import tasks
from interp.analyses.prompt_sizes import PromptSizes, described, doubling
from interp.hooks.prompts.prompts import Prompts

Pair = tuple[Prompts, Prompts]
CHECK_SEED = 1_000_003
"""added to the seed of a run for the prompts of causal tests, so that none repeats a prompt that chose the heads"""
EXPLORED_SEED = 2_000_003
"""added to the seed of a run for the text of the explorer"""
REFERENCE_SEED = 4_000_037
"""added to the seed of a run for the prompts that mean and resample ablations take values from"""
KV_SEED = 3_000_017
"""added to the seed of a run for the tasks of key selectors"""
N_FEW_NEEDLES = 4
N_NEUTRAL, NEUTRAL_LENGTH = 4, 96
"""neutral texts of a causal test, and their number of tokens at most"""
N_REFERENCE = 8
"""reference prompts of mean and resample ablations"""
SWEEP_LONGEST = 2048
"""largest length of a needle sweep where no model is known"""
RELATIONS = ("antonym", "capital", "past", "plural")
"""relations of few-shot prompts"""


@described(
    "{n_needles} texts of at most {needle_length} tokens, each with a made-up fact (the needle) at one of the "
    "depths {needle_depths}, and a question about it"
)
def needles(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """Needle prompts, see `tasks.needle`."""
    return tasks.needle(
        tokenizer,
        lengths=(sizes.needle_length,),
        depths=sizes.needle_depths,
        n=sizes.n_needles,
        haystack=sizes.haystack or None,
        seed=sizes.seed,
    )


@described(
    "{n_needles} texts of at most {long_length} tokens, each with a made-up fact (the needle) at one of the "
    "depths {needle_depths}, and a question about it"
)
def long_needles(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """Needle prompts of `long_length` tokens, many more than the keys that an analysis chooses."""
    return needles(replace(sizes, needle_length=sizes.long_length), tokenizer)


@described(
    "2 × {n_needles} texts of at most {needle_length} tokens, each with a made-up fact (the needle) at one of "
    "the depths {needle_depths}, and a question about it in other words"
)
def inferred_needles(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """Needle prompts that ask in other words than those of the needle, with two distractors.

    There are twice as many as other needle prompts, since a small model answers fewer of them.
    """
    return tasks.needle(
        tokenizer,
        lengths=(sizes.needle_length,),
        depths=sizes.needle_depths,
        n=2 * sizes.n_needles,
        kind="inferred",
        haystack=sizes.haystack or None,
        seed=sizes.seed,
    )


@described(
    "texts with a made-up fact (the needle) and a question about it, {n_sweep} of each length "
    "({sweep_lengths}) and depth ({needle_depths})"
)
def needle_grid(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """Needle prompts of `sweep_lengths`, each at all depths.

    Without lengths, which a run takes from the context of the model, they double up to 2,048 tokens.
    """
    lengths = sizes.sweep_lengths or doubling(SWEEP_LONGEST)
    return tasks.needle(
        tokenizer,
        lengths=lengths,
        depths=sizes.needle_depths,
        n=len(lengths) * len(sizes.needle_depths) * sizes.n_sweep,
        haystack=sizes.haystack or None,
        seed=sizes.seed,
    )


@described(
    "up to 4 of {n_needles} texts of at most {needle_length} tokens, each with a made-up fact (the "
    "needle) at one of the depths {needle_depths}, and a question about it"
)
def few_needles(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """The first four needle prompts."""
    return needles(sizes, tokenizer)[:N_FEW_NEEDLES]


@described(
    "one of {n_needles} texts of at most {needle_length} tokens, each with a made-up fact (the needle) at one of the "
    "depths {needle_depths}, and a question about it"
)
def one_needle(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """The prompts of `needles`, of which an analysis shows one."""
    return needles(sizes, tokenizer)


@described(
    "up to {n_check_needles} texts of at most {check_length} tokens, each with a made-up fact (the needle) at "
    "one of the depths {needle_depths}, and a question about it, which the unmodified model answers right"
)
def check_needles(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """Needle prompts of a causal test, drawn with another seed than those that the heads were chosen on.

    There are twice as many as the test uses, since it uses those that the unmodified model answers right.
    """
    drawn = replace(
        sizes, seed=sizes.seed + CHECK_SEED, needle_length=sizes.check_length, n_needles=2 * sizes.n_check_needles
    )
    return needles(drawn, tokenizer)


@described("a few plain texts of at most {text_length} tokens")
def neutral_texts(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """A few short plain texts of a causal test, drawn with another seed than those that the heads were chosen on."""
    return tasks.passages(
        tokenizer, n=N_NEUTRAL, length=min(sizes.text_length, NEUTRAL_LENGTH), seed=sizes.seed + CHECK_SEED
    )


def check_prompts(sizes: PromptSizes, tokenizer: Any) -> tuple[Prompts, Prompts, Prompts]:
    """Needles, repeated tokens and plain texts of a causal test, drawn with another seed than those of the scores."""
    copies = tasks.repeated(tokenizer, n=sizes.n_repeated, batch=N_NEUTRAL, seed=sizes.seed + CHECK_SEED)
    return check_needles(sizes, tokenizer), copies, neutral_texts(sizes, tokenizer)


@described("{n_texts} plain texts of at most {text_length} tokens")
def passages(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """Plain texts, see `tasks.passages`."""
    return tasks.passages(tokenizer, n=sizes.n_texts, length=sizes.text_length, seed=sizes.seed)


@described(
    "one text of at most {explorer_tokens} tokens with a made-up fact (the needle) at one of the depths "
    "{needle_depths}, and a question about it"
)
def explored(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """One needle prompt of `explorer_tokens` tokens, drawn with another seed than the prompts of the scores."""
    return needles(_explored(sizes), tokenizer)


@described("one plain text of at most {explorer_tokens} tokens")
def explored_passage(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """One plain text of `explorer_tokens` tokens, drawn with another seed than the prompts of the scores."""
    return passages(_explored(sizes), tokenizer)


def _explored(sizes: PromptSizes) -> PromptSizes:
    length = sizes.explorer_tokens
    return replace(
        sizes, seed=sizes.seed + EXPLORED_SEED, needle_length=length, text_length=length, n_needles=1, n_texts=1
    )


def repeated(copies: int = 2, times: int = 1) -> Callable[[PromptSizes, Any], Prompts]:
    """A maker of prompts of repeated random tokens, see `tasks.repeated`.

    Args:
        copies: Number of copies of the random tokens in a prompt.
        times: Number of random tokens, as a multiple of `PromptSizes.n_repeated`.

    Returns:
        Callable: A function of sizes and tokenizer that makes the prompts.
    """

    again = {1: "", 2: ", each followed by its copy"}.get(copies, f", each followed by {copies - 1} copies")
    n_tokens = "{n_repeated}" if times == 1 else f"{times} × {{n_repeated}}"

    @described(f"{{n_texts}} sequences of {n_tokens} random tokens{again}")
    def maker(sizes: PromptSizes, tokenizer: Any) -> Prompts:
        return tasks.repeated(
            tokenizer, n=times * sizes.n_repeated, copies=copies, batch=sizes.n_texts, seed=sizes.seed
        )

    return maker


@described("{n_pairs} sentences in which a name has to be completed, and the same sentences with another name")
def ioi(sizes: PromptSizes, tokenizer: Any) -> Pair:
    """Clean and corrupt prompts of indirect object identification, see `tasks.ioi`."""
    return tasks.ioi(tokenizer, n=sizes.n_pairs, seed=sizes.seed)


@described("{n_pairs} sentences in which a name has to be completed")
def ioi_clean(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """The clean prompts of `ioi`."""
    return ioi(sizes, tokenizer)[0]


@described(
    "{n_needles} lists of documents with a query that one of them answers, and the same lists with a query for nothing"
)
def documents(sizes: PromptSizes, tokenizer: Any) -> Pair:
    """Documents with a query, and the same documents with a query for nothing, see `tasks.documents`."""
    return tasks.documents(tokenizer, n=sizes.n_needles, seed=sizes.seed)


@described("{n_pairs} repeated texts with a word of several tokens, and the same texts with random tokens in its place")
def entities(sizes: PromptSizes, tokenizer: Any) -> Pair:
    """Repeated texts with a word of several tokens, and with random tokens in its place, see `tasks.entities`."""
    real, random = (tasks.entities(tokenizer, n=sizes.n_pairs, random=r, seed=sizes.seed) for r in (False, True))
    return real, random


@described("{n_pairs} prompts without an injected instruction, with one, and with a sentence of its length")
def injection(sizes: PromptSizes, tokenizer: Any) -> tuple[Prompts, Prompts, Prompts]:
    """Prompts without and with an injected instruction, and with a sentence of its length, see `tasks.injection`."""
    normal, attacked, longer = (
        tasks.injection(tokenizer, kind, n=sizes.n_pairs, seed=sizes.seed) for kind in ("normal", "attacked", "longer")
    )
    return normal, attacked, longer


@described(
    "{n_few_shot} few-shot prompts of four relations with permuted answers, and the same prompts with the right answers"
)
def relations(sizes: PromptSizes, tokenizer: Any) -> Pair:
    """Few-shot prompts of four relations with permuted answers, and with the right ones, see `tasks.relations`.

    There are `n_few_shot` of them, in equal parts as far as possible, and at least one of each relation.
    """
    counts = [max(1, len(range(place, sizes.n_few_shot, len(RELATIONS)))) for place in range(len(RELATIONS))]
    shuffled, clean = (
        reduce(
            add,
            [
                tasks.relations(tokenizer, relation, n=count, shuffled=permuted, seed=sizes.seed)
                for relation, count in zip(RELATIONS, counts, strict=True)
            ],
        )
        for permuted in (True, False)
    )
    return shuffled, clean


@described("questions after several contexts, of which one holds the answer")
def contexts(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """Questions after several contexts, one of which answers, see `tasks.contexts`."""
    return tasks.contexts(tokenizer, seed=sizes.seed)


@described("long texts whose hidden passkeys are repeated at the end")
def passkeys(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """Long texts whose passkeys are repeated at the end, see `tasks.passkeys`."""
    return tasks.passkeys(tokenizer, seed=sizes.seed)


@described("{n_pairs} multiple-choice questions")
def choice(sizes: PromptSizes, tokenizer: Any) -> Prompts:
    """Multiple-choice questions, see the task "choice"."""
    return tasks.get("choice").prompts(tokenizer, "all", sizes.n_pairs)


def with_context(own: Prompts, sizes: PromptSizes) -> Prompts:
    """A user's own prompts, in which a prompt without a span "context" is a context as a whole."""
    items = [
        prompt if "context" in prompt.spans else replace(prompt, spans={**prompt.spans, "context": ((0, len(prompt)),)})
        for prompt in own
    ]
    return replace(own, items=tuple(items))


def longest(own: Prompts, sizes: PromptSizes) -> Prompts:
    """The longest of a user's own prompts, cut to `explorer_tokens` tokens."""
    place = max(range(len(own)), key=lambda i: len(own[i]))
    if len(own[place]) <= sizes.explorer_tokens:
        return own[place : place + 1]
    cut = own[place].ids[: sizes.explorer_tokens]
    return Prompts.from_ids([cut], pad_id=own.pad_id, tokenizer=own.tokenizer)
