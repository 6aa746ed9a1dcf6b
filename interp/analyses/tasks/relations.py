"""Few-shot prompts of a relation between words, and the same with the answers of the examples shuffled."""

from random import Random
from typing import Any

from interp.analyses.tasks.task import data, following
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompts


def relations(
    tokenizer: Any, relation: str = "antonym", *, n: int = 8, shots: int = 5, shuffled: bool = False, seed: int = 0
) -> Prompts:
    """Make `n` prompts "Q: hot A: cold, Q: big A: small, ..., Q: tall A:", with each part on a new line.

    Span: "question", the last word of the prompt that is a question. Meta: id, relation, shuffled, and what can follow:
    right, the answer, and wrong, the answer of an example. Prompts of several relations are joined by +.

    Args:
        tokenizer: The tokenizer of the model.
        relation: "antonym", "capital" (of a country), "plural", "past" (tense of a verb) or "comparative".
        n: Number of prompts.
        shots: Number of examples.
        shuffled: Permute the answers of the examples at random, so that none keeps its place and no relation is left.
            Words, their number and the question are those of the clean twin, the prompt of the same seed and number.
        seed: Seed from which all prompts are drawn; prompt i depends on the seed and on i, not on the number.

    Returns:
        Prompts: The prompts.

    Raises:
        UsageError: If the relation is unknown, `n` is below 1, or `shots` is below 2 or more than the relation has.

    Examples:
        >>> interp.tasks.relations(tokenizer, n=1, shots=2)[0].meta["relation"]
        'antonym'

    Source:
        The format of Todd et al. 2310.15213.

    Differs:
        Uses other lists of 42 to 48 pairs, and 5 examples where the paper has 10. A permutation of the paper may leave
        answers in their places.

    Limits:
        Does not show that a model knows the relation; check the probability of "right" in clean prompts.
    """
    known = data("relations.json")
    if relation not in known:
        raise UsageError(f"unknown relation {relation!r}; choose from {', '.join(known)}.")
    pairs = known[relation]
    if n < 1 or not 2 <= shots < len(pairs):
        raise UsageError(
            f"n={n}, shots={shots} are out of range; ask for at least one prompt, with 2 to {len(pairs) - 1} examples."
        )
    items = []
    for i in range(n):
        rng = Random(f"relations/{relation}/{seed}/{i}")
        (word, answer), *examples = rng.sample(pairs, shots + 1)
        questions, answers = [pair[0] for pair in examples], [pair[1] for pair in examples]
        if shuffled:
            answers = [answers[place] for place in deranged(shots, rng)]
        shown = "".join(f"Q: {one}\nA: {other}\n\n" for one, other in zip(questions, answers, strict=True))
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


def deranged(n: int, rng: Random) -> list[int]:
    """A permutation of 0 ... n-1 without a fixed point, each with the same probability."""
    while True:
        # about one permutation in e has no fixed point, whatever n
        order = rng.sample(range(n), n)
        if all(place != number for number, place in enumerate(order)):
            return order
