"""Few-shot prompts of a relation between words, and the same with the answers of the examples mixed up."""

from random import Random
from typing import Any

from interp.analyses.tasks.task import data, following
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompts


def relations(
    tokenizer: Any, relation: str = "antonym", *, n: int = 8, shots: int = 5, shuffled: bool = False, seed: int = 0
) -> Prompts:
    """`n` prompts "Q: hot A: cold, Q: big A: small, ..., Q: tall A:", each part on a line, with `shots` examples.

    relation: "antonym", "capital" (of a country) or "plural". shuffled: the examples' answers change places so that
    none keeps its own, and no relation is left; words, their number and the question are those of the clean twin, the
    prompt of the same seed and number. Prompts of several relations are joined by +.
    Span: "question", the last word asked for. meta: id, relation, shuffled, and what can follow: right, the answer, and
    wrong, that of an example. Prompt i depends on seed and i, not on n.
    Raises UsageError for another relation, n below 1, shots below 2 or more than the relation has.
    Source: the format of Todd et al. 2310.15213. Differs: own lists of 42 to 48 pairs; 5 examples, theirs are 10.
    Cannot show: that a model knows the relation: look at the probability of "right" in clean prompts.
    """
    known = data("relations.json")
    if relation not in known:
        raise UsageError(f"relation={relation!r} is none of ours: use one of {', '.join(known)}.")
    pairs = known[relation]
    if n < 1 or not 2 <= shots < len(pairs):
        raise UsageError(f"n={n}, shots={shots}: ask for a prompt or more, with 2 to {len(pairs) - 1} examples.")
    items = []
    for i in range(n):
        rng = Random(f"relations/{relation}/{seed}/{i}")
        (word, answer), *examples = rng.sample(pairs, shots + 1)
        step = rng.randrange(1, shots)
        asked, answers = [pair[0] for pair in examples], [pair[1] for pair in examples]
        if shuffled:
            answers = answers[step:] + answers[:step]
        shown = "".join(f"Q: {one}\nA: {other}\n\n" for one, other in zip(asked, answers, strict=True))
        text = f"{shown}Q: {word}\nA:"
        start = len(shown) + len("Q: ")
        ends = {"right": [following(text, answer)], "wrong": [following(text, examples[0][1])]}
        items.append(
            {
                "text": text,
                "spans": {"question": (start, start + len(word))},
                "meta": {"id": f"{relation}/{seed}/{i}", "relation": relation, "shuffled": shuffled, **ends},
            }
        )
    return Prompts.encode(tokenizer, items)
