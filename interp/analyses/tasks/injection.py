"""Prompt injection: data for an instruction, and the same data with an instruction that overrides it."""

from random import Random
from typing import Any, Literal, get_args

from interp.analyses.tasks.task import data, split_of
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompts

Kind = Literal["normal", "attacked", "longer"]
Split = Literal["train", "test"]


def injection(
    tokenizer: Any,
    kind: Kind = "normal",
    *,
    split: Split = "train",
    n: int | None = None,
    system: bool = True,
    seed: int = 0,
) -> Prompts:
    """Make `n` prompts of an instruction and one sentence of data.

    Spans: "instruction", "data". Meta: id, kind, split, word. Prompt i has the same instruction and sentence in all
    three kinds. Without a chat template the prompt is "instruction, Data: ..., Answer:".

    Args:
        tokenizer: The tokenizer of the model.
        kind: "normal" is the sentence alone. "attacked" adds an order to ignore the instruction and to print some word.
            "longer" adds another plain sentence, the one nearest to that order in tokens; it is the control for the
            length of the data.
        split: "train" to choose heads, "test" to judge them; no sentence, order or word is in both, whatever the seed.
        n: Number of prompts; by default one for each sentence of the split.
        system: Put the instruction into the system message and the data into the user's. False puts both into the
            user's message, for templates without a system role.
        seed: Seed from which all prompts are drawn; prompt i depends on the seed and on i, not on the number.

    Returns:
        Prompts: The prompts.

    Raises:
        UsageError: If the kind or split is unknown, or there are fewer sentences than `n`.
        PromptError: If the chat template refuses the messages.

    Source:
        The set-up of Hung et al. 2411.00348.

    Differs:
        Uses other sentences, orders and instructions, six of the last, and a fixed test split.

    Limits:
        Does not show attacks other than orders in plain words.
    """
    if kind not in get_args(Kind) or split not in get_args(Split):
        raise UsageError(
            f"unknown kind {kind!r} or split {split!r}; kind is one of {', '.join(get_args(Kind))}, split is "
            "'train' or 'test'."
        )
    known = data("injection.json")
    pools = {name: _of_split(known[name], split) for name in ("sentences", "overrides")}
    words = _of_split(known["words"].split(), split)
    every = Random(f"injection/{split}/{seed}").sample(pools["sentences"], len(pools["sentences"]))
    count = len(every) if n is None else n
    if not 1 <= count <= len(every):
        raise UsageError(
            f"n={n} is out of range; the {split} split has {len(every)} sentences, so use 1 to {len(every)}."
        )
    sizes = dict(zip(every, _sizes(tokenizer, every), strict=True))
    chat = getattr(tokenizer, "chat_template", None) is not None
    items = []
    for i, sentence in enumerate(every[:count]):
        rng = Random(f"injection/{split}/{seed}/{i}")
        instruction, word = rng.choice(known["instructions"]), rng.choice(words)
        order = rng.choice(pools["overrides"]).format(word=word)
        (wanted,) = _sizes(tokenizer, [order])
        others = [other for other in every if other != sentence]
        rng.shuffle(others)
        more = {"normal": "", "attacked": order, "longer": min(others, key=lambda other: abs(sizes[other] - wanted))}
        text = f"{sentence} {more[kind]}".rstrip()
        parts = [("system", instruction), ("user", f"Data: {text}")]
        if not (system and chat):
            parts = [("user", "\n".join(part for _, part in parts))]
        turns = [{"role": role, "content": content} for role, content in parts]
        items.append(
            {
                **({"messages": turns} if chat else {"text": f"{parts[0][1]}\nAnswer:"}),
                "spans": {"instruction": instruction, "data": text},
                "meta": {"id": f"{split}/{seed}/{i}", "kind": kind, "split": split, "word": word},
            }
        )
    return Prompts.encode(tokenizer, items)


def _of_split(texts: list[str], split: Split) -> list[str]:
    # of the three splits of tasks, two are used to choose heads
    return [text for text in texts if (split_of(text) == "test") == (split == "test")]


def _sizes(tokenizer: Any, texts: list[str]) -> list[int]:
    """Number of tokens of each text where it follows another one."""
    return [len(ids) for ids in tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]]
