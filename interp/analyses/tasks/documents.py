"""Documents and a query: short texts with a made-up fact each, one of which answers the question at the end."""

from random import Random
from typing import Any, Literal

from interp.analyses.tasks.haystack import paragraphs
from interp.analyses.tasks.needle import Fact, draw, grammar
from interp.errors import PromptError, UsageError
from interp.hooks.prompts.prompts import Prompts

OPENING = "Below are several paragraphs."
REQUEST = "Which of the paragraphs above help to answer the following query?\n\nQuery: "
NULL = "N/A"
"""the empty query"""


def documents(
    tokenizer: Any,
    *,
    n: int = 8,
    count: int = 6,
    kind: Literal["literal", "inferred"] = "literal",
    chat: bool | None = None,
    seed: int = 0,
) -> tuple[Prompts, Prompts]:
    """Make `n` pairs (prompt, null): numbered documents and a query, and the same documents with the query "N/A".

    Each document is a paragraph of the haystack with a different fact at a random sentence; the query asks for one of
    them.

    Spans: "documents" (a range for each, its number included), "gold" (the document with the answer), "answer", "query"
    (the request, the query and what the template adds after it). Documents are the same tokens at the same places in
    both prompts of a pair. Meta: id, answer, question, key, gold (the number of the document, from 0).

    Args:
        tokenizer: The tokenizer of the model.
        n: Number of pairs.
        count: Number of documents of a prompt.
        kind: "literal" asks in the words of the fact, "inferred" in other words.
        chat: Use the tokenizer's chat template; None uses it if there is one.
        seed: Seed from which all prompts are drawn; pair i depends on the seed and on i, not on the number.

    Returns:
        tuple: Prompts with the query, and their partners with the query "N/A".

    Raises:
        UsageError: If a size is out of range, or the kind is unknown.
        PromptError: If a template or tokenizer changes the documents.

    Source:
        The set-up of QRHead, 2506.09944.

    Differs:
        Uses other texts of about 80 tokens, where the paper has 400 words.

    Limits:
        Does not show search by meaning where `kind` is "literal", since the query then repeats words of the document.
    """
    known = len(grammar()["facts"])
    if n < 1 or not 2 <= count <= known:
        raise UsageError(
            f"n={n}, count={count} are out of range; ask for at least one pair, of 2 to {known} documents."
        )
    if kind not in ("literal", "inferred"):
        raise UsageError(f"unknown kind of query {kind!r}; choose from 'literal', 'inferred'.")
    if chat is None:
        chat = getattr(tokenizer, "chat_template", None) is not None
    queries, null = [], []
    for i, facts in enumerate(draw(n, count, kind, seed)):
        rng = Random(f"documents/{seed}/{i}")
        gold = rng.randrange(count)
        # `draw` puts the fact of the query first
        ordered = [*facts[1 : gold + 1], facts[0], *facts[gold + 1 :]]
        source = paragraphs(f"documents/{seed}/{i}")
        texts = [f"[{d + 1}] {_with(next(source), fact, rng)}" for d, fact in enumerate(ordered)]
        meta = {
            "id": f"documents/{seed}/{i}",
            "answer": facts[0].answer,
            "question": facts[0].question,
            "key": facts[0].key,
            "gold": gold,
        }
        queries.append(_item(tokenizer, texts, facts[0].question, facts[0], gold, chat) | {"meta": meta})
        null.append(_item(tokenizer, texts, NULL, facts[0], gold, chat) | {"meta": meta})
    both = Prompts.encode(tokenizer, queries, chat=chat), Prompts.encode(tokenizer, null, chat=chat)
    for number, (prompt, other) in enumerate(zip(*both, strict=True)):
        end = prompt.spans["documents"][-1][1]
        if prompt.spans["documents"] != other.spans["documents"] or prompt.ids[:end] != other.ids[:end]:
            raise PromptError(
                f"the documents of pair {number} become other tokens with another query after them; use a tokenizer "
                "that does not join them with the query."
            )
    return both


def _with(sentences: list[str], fact: Fact, rng: Random) -> str:
    """The paragraph with a fact at a random sentence."""
    at = rng.randint(0, len(sentences))
    return " ".join([*sentences[:at], fact.sentence, *sentences[at:]])


def _item(tokenizer: Any, texts: list[str], query: str, fact: Fact, gold: int, chat: bool) -> dict[str, Any]:
    """One prompt as an item for Prompts.encode, with spans in characters."""
    body = "\n\n".join([OPENING, *texts, REQUEST + query])
    item: dict[str, Any] = {"text": body}
    text = Prompts.encode(tokenizer, [item], chat=chat)[0].text
    start = text.find(body)
    if start < 0:
        raise PromptError("the chat template changes the text, so spans are lost; use chat=False.")
    places = []
    for part in texts:
        low = text.index(part, places[-1][1] if places else start)
        places.append((low, low + len(part)))
    request = text.index(REQUEST, places[-1][1])
    low = places[gold][0] + texts[gold].index(fact.sentence) + fact.sentence.rindex(fact.answer)
    spans = {
        "documents": places,
        "gold": places[gold],
        "answer": (low, low + len(fact.answer)),
        "query": (request, len(text)),
    }
    return item | {"spans": spans}
