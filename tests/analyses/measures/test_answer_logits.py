"""Which tokens the right and the wrong answer are, and the difference of their logits."""

import pytest
import torch

from interp.analyses.measures.answer_logits import answer_tokens, logit_difference
from interp.errors import PromptError
from interp.hooks.prompts.prompts import Prompts


def prompts(right, wrong) -> Prompts:
    return Prompts.from_ids([[3, 4], [5]], meta=[{"right": right, "wrong": wrong}] * 2)


@pytest.mark.parametrize(
    ("right", "wrong", "tokens"),
    [
        ([[7]], [[2]], [7, 2]),
        ([[7], [1]], [[2]], [7, 2]),
        ([[7]], [[2], [6]], [7, 2]),
        ([[7, 5], [1]], [[2, 8], [6], [0]], [7, 2]),
    ],
)
def test_the_first_right_and_the_first_wrong_answer_are_compared(right, wrong, tokens):
    made = prompts(right, wrong)
    assert answer_tokens(made).tolist() == [tokens] * 2
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logit_difference(logits, made), logits[:, tokens[0]] - logits[:, tokens[1]])


def test_answers_that_begin_alike_are_refused():
    with pytest.raises(PromptError, match="both begin with token 7"):
        answer_tokens(prompts([[7, 1]], [[7, 2]]))
