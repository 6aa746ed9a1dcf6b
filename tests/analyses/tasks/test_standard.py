"""Standard prompts: the sizes that a run checks, and makers that draw what `tasks` draws."""

import inspect
from collections import Counter
from dataclasses import replace

import pytest

from interp.analyses import tasks
from interp.analyses.identify.task_kv import task_kv
from interp.analyses.tasks import standard
from interp.analyses.tasks.standard import PromptSizes
from interp.errors import UsageError
from interp.hooks.prompts.prompts import Prompts

SIZES = PromptSizes(n_needles=5, needle_length=200, n_texts=3, text_length=40, n_repeated=7, n_pairs=5)


def ids(prompts):
    return [prompt.ids for prompt in prompts]


@pytest.mark.parametrize("name", ["n_needles", "needle_length", "reply_tokens", "n_pairs", "training_steps"])
def test_a_size_below_one_is_refused_by_its_name(name):
    with pytest.raises(UsageError, match=rf"^{name}=0 is too small; give a number of at least 1\."):
        PromptSizes(**{name: 0})  # pyright: ignore[reportArgumentType]


def test_the_explorer_can_be_left_out_but_its_size_not_negative():
    assert PromptSizes(explorer_tokens=0).explorer_tokens == 0
    with pytest.raises(UsageError, match=r"^explorer_tokens=-1 is negative"):
        PromptSizes(explorer_tokens=-1)
    with pytest.raises(UsageError, match=r"^needle_depths=\(2\.0,\) has a depth outside"):
        PromptSizes(needle_depths=(2.0,))


def test_prompts_are_those_of_tasks(demo):
    tokenizer = demo.tokenizer
    depths = (0.1, 0.3, 0.5, 0.7, 0.9)
    needles = tasks.needle(tokenizer, lengths=(200,), depths=depths, n=5, seed=0)
    assert ids(standard.needles(SIZES, tokenizer)) == ids(needles)
    assert ids(standard.few_needles(SIZES, tokenizer)) == ids(needles)[:4]
    assert ids(standard.passages(SIZES, tokenizer)) == ids(tasks.passages(tokenizer, n=3, length=40))
    copies = standard.repeated(copies=4, times=2)(SIZES, tokenizer)
    assert ids(copies) == ids(tasks.repeated(tokenizer, n=14, copies=4, batch=3))
    assert ids(standard.ioi_clean(SIZES, tokenizer)) == ids(tasks.ioi(tokenizer, n=5)[0])


def test_causal_tests_and_the_explorer_draw_other_prompts(demo):
    tokenizer = demo.tokenizer
    check = standard.check_needles(SIZES, tokenizer)
    depths = SIZES.needle_depths
    assert ids(check) == ids(tasks.needle(tokenizer, lengths=(192,), depths=depths, n=20, seed=1_000_003))
    sizes = replace(SIZES, explorer_tokens=170)
    (text,) = standard.explored(sizes, tokenizer)
    assert [text.ids] == ids(tasks.needle(tokenizer, lengths=(170,), depths=depths, n=1, seed=2_000_003))
    (passage,) = standard.explored_passage(sizes, tokenizer)
    assert [passage.ids] == ids(tasks.passages(tokenizer, n=1, length=170, seed=2_000_003))


@pytest.mark.parametrize("name", ["ioi", "documents", "entities", "injection", "relations"])
def test_pairs_have_one_partner_for_each_prompt(demo, name):
    first, *others = getattr(standard, name)(replace(SIZES, n_few_shot=5), demo.tokenizer)
    assert len(others) == (2 if name == "injection" else 1)
    for second in others:
        assert len(first) == len(second) == 5
        assert ids(first) != ids(second)


def test_few_shot_prompts_of_a_run_have_four_relations(demo):
    shuffled, clean = standard.relations(PromptSizes(), demo.tokenizer)
    assert Counter(prompt.meta["relation"] for prompt in clean) == dict.fromkeys(standard.RELATIONS, 7)
    assert len(standard.RELATIONS) >= 4
    assert len(shuffled) >= 25
    assert all(one.meta["shuffled"] and not other.meta["shuffled"] for one, other in zip(shuffled, clean, strict=True))
    few = standard.relations(PromptSizes(n_few_shot=1), demo.tokenizer)[0]
    assert [prompt.meta["relation"] for prompt in few] == list(standard.RELATIONS)


def test_prompts_of_a_run_leave_something_to_choose(demo):
    sizes = PromptSizes(n_needles=2)
    for prompt in standard.long_needles(sizes, demo.tokenizer):
        assert len(prompt) > 2 * inspect.signature(task_kv).parameters["top"].default
    inferred = standard.inferred_needles(sizes, demo.tokenizer)
    assert len(inferred) == 4
    for prompt in inferred:
        assert prompt.meta["kind"] == "inferred"
        assert len(prompt.spans["distractor"]) == 2


def test_own_prompts_of_lookback_are_contexts_where_they_name_none():
    own = Prompts.from_ids([[5, 6, 7], [8, 9, 10]], spans=[{"context": (1, 2)}, {"mark": (0, 1)}])
    one, other = standard.with_context(own, SIZES)
    assert one.spans == {"context": ((1, 2),)}
    assert other.spans == {"mark": ((0, 1),), "context": ((0, 3),)}


@pytest.mark.parametrize("name", ["contexts", "passkeys", "choice"])
def test_single_sets(demo, name):
    assert isinstance(getattr(standard, name)(SIZES, demo.tokenizer), Prompts)
