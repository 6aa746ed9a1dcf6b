"""The public contracts: our own methods keep them, and a method that is broken on purpose is named."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from detectors import METHODS as DETECTORS
from kv_oracle import scores as scores_of

from interp import kv, steer, testing
from interp.analyses import identify, registry
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.steer.boost import Boost
from interp.testing import ContractError

VECTORS = {f"L{layer}H{head}": [float(head + i % 3) for i in range(16)] for layer in range(2) for head in range(4)}
EDITS: dict[str, tuple[Any, Any]] = {
    "pasta": (steer.Pasta("mark", 0.05), steer.Pasta("mark", 1.0)),
    "act": (steer.Act(0.2, 0.02), steer.Act(1.0)),
    "zerotuning": (steer.ZeroTuning(4.0), steer.ZeroTuning(1.0)),
    "boost": (steer.Boost("mark", 4.0), steer.Boost("mark", 1.0)),
    "spotlight": (steer.SpotLight("mark", 0.5), steer.SpotLight("mark", 0.0)),
    "knockout": (steer.Knockout("mark"), None),
    "temperature": (steer.Temperature(0.5), steer.Temperature(1.0)),
    "gate": (steer.Gate(0.3), steer.Gate(1.0)),
    "keyscale": (steer.KeyScale(1.6), steer.KeyScale(1.0)),
    "redistribute": (steer.Redistribute("mark", 0.4, 0.0, 1.0, sinks=0), steer.Redistribute("mark", 1.0)),
    "found_in_the_middle": (steer.FoundInTheMiddle(["mark", "other"], [0.02, 0.05], temperature=0.05), None),
    "offset": (steer.Offset(VECTORS), steer.Offset(VECTORS, scale=0.0)),
}
SHARE = {"keep_ratio": 0.6}


def of_scores(kind: Any, **settings: Any) -> Any:
    """A maker of a selector that takes the scores of the model."""

    def make(*, model: Any, keep_ratio: float, **more: Any) -> Any:
        return kind.from_scores(scores_of(model), keep_ratio, **settings, **more)

    return make


SELECTORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "random_keys": (kv.RandomKeys, {}),
    "streaming": (kv.Streaming, {}),
    "snapkv": (partial(kv.SnapKV, window=4, kernel_size=3), {}),
    "task_kv": (partial(kv.TaskKV, part=0.5, top=9, window=4), SHARE),
    "compress_kv": (of_scores(kv.CompressKV, n_voters=2, window=4), {}),
    "head_kv": (of_scores(kv.HeadKV, window=4), {}),
    "duo_attention": (of_scores(kv.DuoAttention, part=0.5), SHARE),
    # its mean key stands for the dropped ones, which a mask does not show
    "razor_attention": (of_scores(kv.RazorAttention, part=0.5), SHARE | {"literal": False}),
}


def test_every_edit_and_selector_is_in_these_tables():
    assert EDITS.keys() == {*registry.names("edit")}
    assert SELECTORS.keys() == {*registry.names("selector")}


@pytest.mark.parametrize("name", EDITS)
def test_edit(name):
    edit, noop = EDITS[name]
    testing.check_edit(edit, noop=noop)


@pytest.mark.parametrize("name", SELECTORS)
def test_selector(name):
    make, settings = SELECTORS[name]
    testing.check_selector(make, **settings)


@pytest.mark.parametrize("method", DETECTORS, ids=lambda method: method.name)
def test_detector(method):
    testing.check_detector(
        method.run, method.kind, controls=method.controls, seeds=[1], absent=method.low
    )  # fmt: skip


@pytest.mark.parametrize("name", ["induction", "previous_token", "duplicate_token", "sinks", "positional"])
def test_invariances(name):
    testing.check_invariances(getattr(identify, name), "induction")


def changed(change: Any) -> Any:
    """Induction with its scores changed by a function of (per_prompt, prompts, batch_size)."""

    def method(model: Any, prompts: Any, *, batch_size: int = 8, **settings: Any) -> HeadScores:
        found = identify.induction(model, prompts, batch_size=batch_size, **settings)
        return replace(found, per_prompt=change(found.per_prompt, prompts, batch_size))

    return method


BROKEN_SCORES: dict[str, tuple[Any, str]] = {
    "of nothing": (lambda x, prompts, size: torch.zeros_like(x), "all scores are 0"),
    "by batch": (lambda x, prompts, size: x + size, "prompts one by one"),
    "by place": (lambda x, prompts, size: x + torch.arange(len(x))[:, None, None], "gave other scores"),
    "by chance": (lambda x, prompts, size: x + torch.rand(()), "a second call"),
}


@pytest.mark.parametrize("name", BROKEN_SCORES)
def test_scores_that_vary_are_named(name):
    change, message = BROKEN_SCORES[name]
    with pytest.raises(ContractError, match=message):
        testing.check_invariances(changed(change), "induction")


def test_a_detector_of_another_head_is_named():
    other = changed(lambda x, prompts, size: x.flip(2))
    with pytest.raises(ContractError, match="is planted"):
        testing.check_detector(other, "induction", families=["llama"], seeds=[0])
    with pytest.raises(ContractError, match="the head still scores"):
        testing.check_detector(
            changed(lambda x, prompts, size: x + 0.5), "induction", families=["llama"], seeds=[0], present=1.0
        )
    with pytest.raises(ContractError, match="nothing to check"):
        testing.check_detector(identify.induction, "induction", seeds=[])


@dataclass(frozen=True)
class Undeclared(Boost):
    """An edit that no file of edits can hold."""


@dataclass(frozen=True)
class Everywhere(Boost):
    """An edit that acts in all heads, whichever it names."""

    def apply(self, here):
        every = torch.arange(here.call.sizes[1], device=here.heads.device)
        return super().apply(replace(here, heads=every))


@dataclass(frozen=True)
class Silent(Boost):
    """An edit that changes nothing and does not say so."""

    def apply(self, here):
        return here.call


@pytest.fixture
def declared(monkeypatch):
    """Let files of edits hold these classes for as long as a test runs."""
    from interp.testing import edits

    monkeypatch.setattr(edits, "_stored", lambda edit: None)


def test_an_edit_that_does_not_come_back_is_named():
    with pytest.raises(ContractError, match="does not come back from a file"):
        testing.check_edit(Undeclared("mark", 4.0))


@pytest.mark.usefixtures("declared")
def test_broken_edits_are_named():
    with pytest.raises(ContractError, match="changes no logit"):
        testing.check_edit(Silent("mark", 4.0), families=["llama"])
    with pytest.raises(ContractError, match="changes what other heads write"):
        testing.check_edit(Everywhere("mark", 4.0), families=["llama"])
    with pytest.raises(ContractError, match="does not say that it changes nothing"):
        testing.check_edit(steer.Boost("mark", 4.0), noop=steer.Boost("mark", 2.0), families=["llama"])


@dataclass(frozen=True)
class Greedy(kv.Streaming):
    """A selector that keeps more than it is asked to."""

    def spread(self, here):
        return super().spread(here) + 0.2


@dataclass(frozen=True)
class Forgetful(kv.Streaming):
    """A selector that drops a key more than it notes."""

    def kept(self, here, length):
        chosen, count = super().kept(here, length)
        chosen[..., 0] = False
        return chosen, count


@dataclass(frozen=True)
class Restless(kv.Streaming):
    """A selector that does not say that a ratio of 1 changes nothing."""

    @property
    def is_noop(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Greedy, "of the keys of a prompt are kept, expected"),
        (Forgetful, "a key among the first 2 is dropped"),
        (Restless, "does not say that it changes nothing"),
    ],
)
def test_broken_selectors_are_named(make, message):
    with pytest.raises(ContractError, match=message):
        testing.check_selector(make)


def test_contracts_are_not_loaded_with_the_package():
    import subprocess
    import sys

    code = (
        "import sys, interp; [getattr(interp, name) for name in interp.__all__]; print('interp.testing' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
