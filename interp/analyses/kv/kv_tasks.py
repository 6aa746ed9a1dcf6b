"""Tasks of key selection: contexts whose keys are dropped, questions, and the tokens of the right answers."""

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
    """Contexts whose keys are dropped, and the tokens after each: a question and its right answer.

    Args:
        name: Name of the task.
        contexts: The contexts.
        rest: Tokens after each context.
        answers: Number of tokens at the end of each `rest` that are the answer.
    """

    name: str
    contexts: Prompts
    rest: tuple[tuple[int, ...], ...]
    answers: tuple[int, ...]

    @classmethod
    def cut(cls, name: str, prompts: Prompts, ends: Sequence[int], answers: Sequence[Sequence[int]]) -> "KVTask":
        """Cut prompts into a context and a question, and append an answer.

        Args:
            name: Name of the task.
            prompts: Prompts that hold a context and a question.
            ends: Number of tokens of each context.
            answers: Tokens of each answer.

        Returns:
            KVTask: the task.

        Raises:
            PromptError: If a context or an answer is empty.
        """
        rows, rest = [], []
        for prompt, end, answer in zip(prompts, ends, answers, strict=True):
            if not 0 < end < len(prompt) or not answer:
                raise PromptError(
                    f"a prompt of {len(prompt)} tokens cannot be cut at {end} with an answer of {len(answer)} tokens; "
                    "give a context, a question and an answer."
                )
            rows.append(prompt.ids[:end])
            rest.append((*prompt.ids[end:], *answer))
        contexts = Prompts.from_ids(rows, pad_id=prompts.pad_id, tokenizer=prompts.tokenizer)
        return cls(name, contexts, tuple(rest), tuple(map(len, answers)))

    @property
    def whole(self) -> Prompts:
        """Each context with its question and answer, as one prompt with the spans "context" and "answer"."""
        rows = [(*context.ids, *rest) for context, rest in zip(self.contexts, self.rest, strict=True)]
        spans = [
            {"context": (0, len(context)), "answer": (len(row) - answer, len(row))}
            for context, row, answer in zip(self.contexts, rows, self.answers, strict=True)
        ]
        meta = [{"task": self.name}] * len(rows)
        contexts = self.contexts
        return Prompts.from_ids(rows, spans=spans, meta=meta, pad_id=contexts.pad_id, tokenizer=contexts.tokenizer)

    @classmethod
    def from_whole(cls, prompts: Prompts) -> tuple["KVTask", ...]:
        """The tasks whose prompts `whole` gave, in the order of their first prompts.

        Args:
            prompts: Prompts of one or several tasks.

        Returns:
            The tasks.

        Raises:
            PromptError: If a prompt has no span "context" or "answer".
        """
        names = dict.fromkeys(str(prompt.meta.get("task", "")) for prompt in prompts)
        found = []
        for name in names:
            rows = [prompt for prompt in prompts if str(prompt.meta.get("task", "")) == name]
            if bare := [row for row in rows if not {"context", "answer"} <= set(row.spans)]:
                raise PromptError(
                    f"a prompt has the spans {sorted(bare[0].spans)}; give prompts of key selection, with the spans "
                    "'context' and 'answer'."
                )
            ends = [row.spans["context"][0][1] for row in rows]
            contexts = Prompts.from_ids(
                [row.ids[:end] for row, end in zip(rows, ends, strict=True)],
                pad_id=prompts.pad_id,
                tokenizer=prompts.tokenizer,
            )
            rest = tuple(row.ids[end:] for row, end in zip(rows, ends, strict=True))
            answers = tuple(stop - start for row in rows for start, stop in row.spans["answer"])
            found.append(cls(name, contexts, rest, answers))
        return tuple(found)


def kv_tasks(tokenizer: Any, n: int = 16, length: int = 400, seed: int = 0) -> tuple[KVTask, ...]:
    """Three tasks: a needle whose question follows the text, random tokens that are repeated, one of five new facts.

    The keys of the text, of the first copy, or of the facts are dropped before the question or the second copy is read,
    so that a selector has to choose without knowing the question.

    Args:
        tokenizer: A fast tokenizer.
        n: Number of prompts of each task; new facts has at most 40.
        length: Number of tokens of a needle prompt; a copy of random tokens has a quarter of it.
        seed: Seed of the prompts.

    Returns:
        The tasks "needle", "repeated tokens" and "new facts".
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
    """The task "counterfact" with several changed facts in each prompt, and a question about one of them.

    A single fact is as short as a window of last keys, so that no selector would have anything to choose.

    Args:
        seed: Seed of the other facts and of the order.
        others: Number of other facts.

    Returns:
        Task: the task.
    """
    task = get("counterfact")
    items = task.items()
    number = {item["id"]: i for i, item in enumerate(items)}

    def render(item: Item, tokenizer: Any) -> dict[str, Any]:
        draw = Random(f"{seed}/{item['id']}")
        rest = [each for i, each in enumerate(items) if i != number[item["id"]]]
        chosen = [item, *draw.sample(rest, others)]
        draw.shuffle(chosen)
        statements = [each["messages"][0]["content"].removesuffix(each["question"]).strip() for each in chosen]
        message = {"role": "user", "content": f"{' '.join(statements)} {item['question']}"}
        spans = {**item["spans"], "question": item["question"]}
        return task.render({**item, "messages": [message], "spans": spans}, tokenizer)

    return replace(task, render=render)
