"""What a run measures: each analysis with the prompts that it is asked on, and the settings of all of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from interp.analyses import identify
from interp.analyses.kv import KVTask, asked
from interp.analyses.results.head_scores import HeadScores
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.menu import MENU, needles, passages

ORDER = ("retrieval", "induction", "previous_token", "duplicate_token", "sinks")
"""what "all" stands for"""
KEYS = "key_selectors"
OF_HEADS = ("influence", "qk_projection", "logit_lens", KEYS)
"""what is made of heads that other analyses found, or that are named; no scores of their own"""
MORE = (*(name for name in MENU if name not in ORDER), *OF_HEADS)
"""what is measured when it is named"""
GROUPS = {
    "all": ORDER,
    "long": (
        "retrieval", "razor_induction", "razor_echo",
        "semantic_retrieval", "retrieval_reasoning", "qrhead", "task_kv", "qada", "duo_gates",
    ),
    "every": (*ORDER, *(name for name in MENU if name not in ORDER), KEYS),
}  # fmt: skip
"""names for several"""
VOCABULARY = 4
"""prompts of the vocabulary view"""
SHORT = {
    "patching": "activation_patching", "attribution": "attribution_patching", "duo": "duo_gates",
    "tracker": "attention_tracker", "concept": "concept_induction",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The settings of a run: with one model, machine and set of versions they fix every number of it."""

    analyses: tuple[str, ...] = ORDER
    seed: int = 0
    needles: int = 16
    """prompts of retrieval"""
    length: int = 320
    """tokens of a needle prompt"""
    reply: int = 20
    """new tokens of a reply to it"""
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    texts: int = 12
    """prompts of every other analysis, and of each task of the key selectors"""
    text_length: int = 256
    """tokens of a plain text"""
    repeat: int = 50
    """random tokens that are repeated once"""
    check: bool = True
    """run the causal check where retrieval is measured"""
    check_needles: int = 12
    check_length: int = 224
    k: int = 10
    pairs: int = 16
    """pairs of prompts of patching and logit attribution"""
    draws: int = 3
    kind: str = "zero"
    heads: str = ""
    """heads of the causal check; empty for the top k of retrieval"""
    steps: int = 100
    """of the optimisation of DuoAttention's gates"""
    explore: int = 1024
    """tokens of the text in the explorer; 0 for no explorer"""
    batch_size: int = 8

    def __post_init__(self) -> None:
        unknown = [name for name in self.analyses if name not in (*ORDER, *MORE)]
        if unknown or not self.analyses:
            known = ", ".join((*ORDER, *MORE))
            raise UsageError(f"analyses {', '.join(unknown) or 'none'} do not exist: take some of {known}, or all.")
        if "influence" in self.analyses and "retrieval" not in self.analyses and not self.heads:
            raise UsageError("influence masks retrieval heads: add retrieval to the analyses, or name heads.")
        # some key selectors need no scores
        shown = [name for name in self.analyses if name in OF_HEADS and name != KEYS]
        if shown and not self.heads and not set(self.analyses) - set(OF_HEADS):
            raise UsageError(f"{', '.join(shown)} shows heads that others find: add an analysis, or name heads.")
        for name in (
            "pairs",
            "needles",
            "texts",
            "check_needles",
            "k",
            "draws",
            "batch_size",
            "repeat",
            "reply",
            "steps",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: give at least 1.")

        if self.explore < 0:
            raise UsageError(f"explore={self.explore}: give the tokens of the explorer's text, or 0 for no explorer.")

    @property
    def checked(self) -> bool:
        return self.check and ("retrieval" in self.analyses or bool(self.heads))


@dataclass(frozen=True, eq=False)
class Study:
    """One analysis on its prompts."""

    name: str
    run: Callable[..., HeadScores]
    prompts: Prompts
    settings: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    """all prompts are one cell"""
    resumes: bool = False
    """it takes a folder, to go on within its cell"""
    reply: int = 0
    """new tokens that must fit after a prompt"""

    @property
    def read(self) -> tuple[Prompts, ...]:
        """All prompts that the model reads: the partners too, where there are pairs."""
        return (self.prompts, self.run.partners) if isinstance(self.run, Paired) else (self.prompts,)

    def batches(self, size: int) -> Iterator[Prompts]:
        """The prompts of each cell."""
        return self.prompts.batches(len(self.prompts) if self.whole else size)


def parse_analyses(text: str) -> tuple[str, ...]:
    """The names in "retrieval,sinks" or "all", hyphens for underscores allowed, each once, in the order of a report.

    "all", "long" and "every" stand for several, see GROUPS. Raises UsageError for unknown names.
    """
    given = [name.strip().replace("-", "_") for name in text.split(",") if name.strip()]
    names = [name for part in given for name in GROUPS.get(part, (SHORT.get(part, part),))]
    unknown = [name for name in names if name not in (*ORDER, *MORE)]
    if unknown or not names:
        near = get_close_matches(unknown[0], (*ORDER, *MORE, *SHORT, *GROUPS), 1) if unknown else []
        raise UsageError(
            f"analysis {', '.join(map(repr, unknown)) or repr(text)} does not exist"
            f"{f', did you mean {near[0]!r}' if near else ''}: take some of "
            f"{', '.join((*ORDER, *MORE))}, separated by commas, or {', '.join(GROUPS)}; safety stands alone."
        )
    return tuple(name for name in (*ORDER, *MORE) if name in names)


def studies(plan: Plan, tokenizer: Any, own: Prompts | None = None) -> list[Study]:
    """The analyses of a plan with their prompts; `own` prompts take the place of the made ones in all of them.

    Raises UsageError for own prompts where an analysis takes prompts of a form that is its own, and what an analysis
    raises for prompts without the parts or the length that it needs.
    """
    named = [name for name in plan.analyses if name not in OF_HEADS]
    fixed = [name for name in plan.analyses if name == KEYS or (name in named and not MENU[name].own)]
    if own is not None and fixed:
        raise UsageError(f"{', '.join(fixed)} takes prompts made for it, in pairs or with parts: leave --prompts out.")
    # the replies of retrieval end earlier than its own default
    more = {"retrieval": {"max_new_tokens": plan.reply}, "duo_gates": {"steps": plan.steps}}
    found = []
    for name in named:
        dish, run = MENU[name], getattr(identify, name)
        made: Any = own if own is not None else dish.make(plan, tokenizer)
        if dish.paired:
            made, partners = made
            run = Paired(run, made, partners, dish.first)
        if dish.check is not None:
            dish.check(made)
        reply = plan.reply if name == "retrieval" else dish.reply
        found.append(Study(name, run, made, dish.settings | more.get(name, {}), dish.whole, dish.resumes, reply))
    return found


@dataclass(frozen=True, eq=False)
class Paired:
    """An analysis of prompts and their partners, asked for some of the prompts."""

    run: Any
    prompts: Prompts
    partners: Prompts
    first: bool = False
    """all of the partners, before the prompts"""

    def __call__(self, model: Any, batch: Prompts, **settings: Any) -> HeadScores:
        if self.first:
            return self.run(model, self.partners, batch, **settings)
        place = {id(prompt): number for number, prompt in enumerate(self.prompts)}
        theirs = tuple(self.partners.items[place[id(prompt)]] for prompt in batch)
        return self.run(model, batch, replace(self.partners, items=theirs), **settings)


def check_prompts(plan: Plan, tokenizer: Any) -> Prompts:
    """Needles for the causal check; another seed, so that none of the prompts the heads were found on comes again."""
    other = replace(plan, seed=plan.seed + 1_000_003, length=plan.check_length, needles=plan.check_needles)
    return needles(other, tokenizer)


def asked_of_heads(plan: Plan, tokenizer: Any, own: Prompts | None = None) -> dict[str, Prompts]:
    """The prompts of each of OF_HEADS that the plan names, but for those of the key selectors."""
    made = {"influence": passages, "qk_projection": passages, "logit_lens": lambda *given: needles(*given)[:VOCABULARY]}
    named = [name for name in made if name in plan.analyses]
    return {name: own if own is not None else made[name](plan, tokenizer) for name in named}


def key_tasks(plan: Plan, tokenizer: Any) -> tuple[KVTask, ...]:
    """What key selectors are asked, where the plan names them; another seed than that of the prompts of the scores."""
    if KEYS not in plan.analyses:
        return ()
    return asked(tokenizer, n=plan.texts, length=plan.length, seed=plan.seed + 3_000_017)


def explored_prompt(plan: Plan, tokenizer: Any, own: Prompts | None, context: int | None) -> Prompts:
    """The one text of the explorer: the longest own prompt, else a needle, else a passage, as far as a context goes."""
    length = min(plan.explore, plan.explore if context is None else context)
    if own is not None:
        longest = max(range(len(own)), key=lambda i: len(own[i]))
        if len(own[longest]) <= length:
            return own[longest : longest + 1]
        cut = own[longest].ids[:length]
        return Prompts.from_ids([cut], pad_id=own.pad_id, tokenizer=own.tokenizer)
    # a seed of its own: no prompt that heads were scored on
    other = replace(plan, seed=plan.seed + 2_000_003, length=length, text_length=length, needles=1, texts=1)
    return needles(other, tokenizer) if "retrieval" in plan.analyses else passages(other, tokenizer)


def brief(prompt: Prompt, tokenizer: Any, tokens: int = 32) -> str:
    """What a prompt asks, or how it begins."""
    return str(prompt.meta.get("question") or tokenizer.decode(prompt.ids[:tokens], skip_special_tokens=True)).strip()
