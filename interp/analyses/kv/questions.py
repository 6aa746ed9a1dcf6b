"""What is asked of a context whose keys are dropped, and the tokens of its right answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from interp.analyses.tasks import get, needle, repeated
from interp.analyses.tasks.task import Item, Task, following
from interp.errors import PromptError
from interp.hooks.prompts.prompts import Prompts


@dataclass(frozen=True)
class KVTask:
    """A context whose keys are dropped, and what is read after it: a question and the tokens of its right answer."""

    name: str
    contexts: Prompts
    rest: tuple[tuple[int, ...], ...]
    """of each context, the tokens after it"""
    answers: tuple[int, ...]
    """of each, how many tokens at the end of `rest` are the answer"""

    @classmethod
    def cut(cls, name: str, prompts: Prompts, ends: Sequence[int], answers: Sequence[Sequence[int]]) -> "KVTask":
        """Prompts cut after `ends` tokens, with the tokens of an answer put behind. Raises PromptError."""
        rows, rest = [], []
        for prompt, end, answer in zip(prompts, ends, answers, strict=True):
            if not 0 < end < len(prompt) or not answer:
                raise PromptError(f"a prompt of {len(prompt)} tokens was cut at {end} for an answer of {len(answer)}.")
            rows.append(prompt.ids[:end])
            rest.append((*prompt.ids[end:], *answer))
        contexts = Prompts.from_ids(rows, pad_id=prompts.pad_id, tokenizer=prompts.tokenizer)
        return cls(name, contexts, tuple(rest), tuple(map(len, answers)))

    @property
    def whole(self) -> Prompts:
        """Each context with what is read after it, as one prompt with the spans "context" and "answer"."""
        rows = [(*context.ids, *rest) for context, rest in zip(self.contexts, self.rest, strict=True)]
        spans = [
            {"context": (0, len(context)), "answer": (len(row) - answer, len(row))}
            for context, row, answer in zip(self.contexts, rows, self.answers, strict=True)
        ]
        return Prompts.from_ids(rows, spans=spans, pad_id=self.contexts.pad_id, tokenizer=self.contexts.tokenizer)


def asked(tokenizer: Any, n: int = 16, length: int = 400, seed: int = 0) -> tuple[KVTask, ...]:
    """Three tasks: a needle asked for after the text, random tokens that come again, one of five new facts.

    The keys of the text, of the first copy, of the facts are dropped before the question, the second copy, comes: what
    is kept has to be chosen without knowing what will be asked.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    needles = needle(tokenizer, lengths=(length,), n=n, seed=seed)
    answers = [ids(following(prompt.text, prompt.meta["answer"])) for prompt in needles]
    first = KVTask.cut("needle", needles, [prompt.spans["question"][0][0] for prompt in needles], answers)
    copies = repeated(tokenizer, n=length // 4, batch=n, seed=seed)
    half = [prompt.spans["second"][0][0] + 4 for prompt in copies]
    parts = [prompt.ids[:end] for prompt, end in zip(copies, half, strict=True)]
    given = Prompts.from_ids(parts, pad_id=copies.pad_id, tokenizer=tokenizer)
    later = [prompt.ids[end : end + length // 8] for prompt, end in zip(copies, half, strict=True)]
    second = KVTask.cut("repeated tokens", given, [end - 4 for end in half], later)
    facts = new_facts(seed).prompts(tokenizer, "test", min(n, 40))
    right = [ids(prompt.meta["right"][0]) for prompt in facts]
    third = KVTask.cut("new facts", facts, [prompt.spans["question"][0][0] for prompt in facts], right)
    return first, second, third


def new_facts(seed: int = 0, others: int = 4) -> Task:
    """The task "counterfact" with other changed facts beside the one that is asked about, in any order.

    One fact is as short as a window of last keys: of one alone no selector would have anything to choose.
    """
    task = get("counterfact")
    items = task.items()
    number = {item["id"]: i for i, item in enumerate(items)}

    def render(item: Item, tokenizer: Any) -> dict[str, Any]:
        draw = Random(f"{seed}/{item['id']}")
        rest = [each for i, each in enumerate(items) if i != number[item["id"]]]
        chosen = [item, *draw.sample(rest, others)]
        draw.shuffle(chosen)
        told = [each["messages"][0]["content"].removesuffix(each["question"]).strip() for each in chosen]
        message = {"role": "user", "content": f"{' '.join(told)} {item['question']}"}
        spans = {**item["spans"], "question": item["question"]}
        return task.render({**item, "messages": [message], "spans": spans}, tokenizer)

    return replace(task, render=render)
