"""Data that allow no verdict: every evaluation raises one sentence, or returns a result whose words claim nothing."""

from typing import Any

import pytest
import tiny_chat_model
import torch

from interp import steer
from interp.analyses.causal.ablation_test import ablation_test
from interp.analyses.causal.curve import causal_curve
from interp.analyses.kv.kv_selection import kv_selection
from interp.analyses.kv.kv_tasks import KVTask
from interp.analyses.measures.losses import token_losses
from interp.analyses.pruning import pruning_curve
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trials import Trials
from interp.analyses.views.head_roles import HeadRoles, head_roles
from interp.errors import InterpError
from interp.hooks.model.heads import HeadSet
from interp.hooks.prompts.prompts import Prompts
from interp.report.trials_words import trials_words

N_SETS = 39


def table(case: str) -> HeadScores:
    values = torch.rand(1 if case == "one prompt" else 3, 2, 4, generator=torch.Generator().manual_seed(3))
    if case == "all prompts failed":
        values[:] = torch.nan
    if case == "all scores equal":
        values[:] = 0.5
    if case == "few heads in a layer":
        values[:, 0, :3] += 0.3
    if case == "k beyond the floor":
        values[:, :, 1:] = 0
    return HeadScores("made", values, threshold=0.3)


def texts(case: str) -> Prompts:
    rows = [{"text": f"number {i} is {i}{i}{i}, say yes", "spans": {"mark": "is"}} for i in range(3)]
    return Prompts.encode(tiny_chat_model.tokenizer(), rows[: 1 if case == "one prompt" else 3])


def judge(case: str):
    return lambda reply, prompt: case != "all prompts failed" and len(set(reply)) % 2 == 0


def ablated(case: str) -> Trials:
    settings: Any = {"n_heads": 3, "n_random_sets": N_SETS, "max_new_tokens": 1}
    return ablation_test(tiny_chat_model.model(), texts(case), table(case), judge=judge(case), **settings)


def curve(case: str) -> Trials:
    measures = {"loss": lambda model: token_losses(model, texts(case))}
    rankings = {"made": table(case), "other": list(HeadSet.parse("L1H0, L1H1, L1H2"))}
    return causal_curve(tiny_chat_model.model(), rankings, measures, sizes=(1, 3), n_random_sets=N_SETS)


def pruned(case: str) -> Trials:
    settings = {"fractions": (0.0, 0.5), "n_random_sets": N_SETS}
    return pruning_curve(tiny_chat_model.model(), texts(case), table(case), **settings)


def compared(case: str):
    other = HeadScores("other", torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(4)))
    return table(case).compare(other, k=3)


def roles(case: str):
    return head_roles({"made": table(case)})


def steered(case: str) -> Trials:
    heads = table(case).heads(top=3)
    edit = steer.Boost("mark", 4.0, heads=str(heads))
    settings = {"judge": judge(case), "max_new_tokens": 1, "n_random_sets": N_SETS}
    return steer.steer_check(tiny_chat_model.model(), texts(case), edit, **settings)


def selected(case: str) -> Trials:
    batch = texts(case)
    task = KVTask.cut("copy", batch, ends=[12] * len(batch), answers=[[5]] * len(batch))
    settings = {"selectors": ("duo_attention",), "scores": {"duo_gates": table(case)}, "keep_ratios": (0.5,)}
    return kv_selection(tiny_chat_model.model(), task.whole, **settings)


EVALUATIONS = {
    "ablation_test": ablated, "causal_curve": curve, "pruning": pruned, "compare": compared, "roles": roles,
    "steering": steered, "selectors": selected,
}  # fmt: skip
CASES = ("one prompt", "all prompts failed", "all scores equal", "few heads in a layer", "k beyond the floor")


def claims(found) -> bool:
    """Whether a result, in its words or tables, claims that something is there."""
    if isinstance(found, Trials):
        words = trials_words(found)
        assert words
        assert all(sentence.endswith(".") for sentence in words)
        told = any(
            word in " ".join(words)
            for word in ("larger effect than", "smaller effect than", "has a higher", "excludes 0", "points [")
        )
        return told or any(found.findings(measure) for measure in found.measures)
    return bool(found.confident.any()) if isinstance(found, HeadRoles) else found.p_overlap <= 0.05


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", EVALUATIONS)
def test_nothing_is_claimed(name, case):
    message, found = "", None
    try:
        found = EVALUATIONS[name](case)
    except InterpError as error:
        message = str(error)
    if found is None:
        assert message.endswith(".")
        assert "\n" not in message
    else:
        assert not claims(found), f"{found}"
