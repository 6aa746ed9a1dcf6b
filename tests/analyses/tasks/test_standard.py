"""Standard prompts: the sizes that a run checks, and makers that draw what `tasks` draws."""

from dataclasses import replace

import pytest

from interp.analyses import tasks
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
    assert ids(check) == ids(tasks.needle(tokenizer, lengths=(144,), depths=depths, n=10, seed=1_000_003))
    sizes = replace(SIZES, explorer_tokens=150)
    (text,) = standard.explored(sizes, tokenizer)
    assert [text.ids] == ids(tasks.needle(tokenizer, lengths=(150,), depths=depths, n=1, seed=2_000_003))
    (passage,) = standard.explored_passage(sizes, tokenizer)
    assert [passage.ids] == ids(tasks.passages(tokenizer, n=1, length=150, seed=2_000_003))


@pytest.mark.parametrize("name", ["ioi", "documents", "entities", "injection", "relations"])
def test_pairs_have_one_partner_for_each_prompt(demo, name):
    first, second = getattr(standard, name)(SIZES, demo.tokenizer)
    assert len(first) == len(second) == {"relations": 2}.get(name, 5)
    assert ids(first) != ids(second)


@pytest.mark.parametrize("name", ["contexts", "passkeys", "choice"])
def test_single_sets(demo, name):
    assert isinstance(getattr(standard, name)(SIZES, demo.tokenizer), Prompts)
