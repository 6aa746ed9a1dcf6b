"""The public contracts: our own methods keep them, and a method that is broken on purpose is named."""

from dataclasses import dataclass, replace
from typing import Any

import edit_cases
import kv_oracle
import pytest
import torch
from detectors import METHODS as DETECTORS

from interp import kv, steer, testing
from interp.analyses import identify, registry
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.steer.boost import Boost
from interp.testing import ContractError


def test_every_edit_and_selector_is_in_these_tables():
    assert edit_cases.CONTRACTS.keys() == {*registry.names("edit")}
    assert kv_oracle.CONTRACTS.keys() == {*registry.names("selector")}


@pytest.mark.parametrize("name", edit_cases.CONTRACTS)
def test_edit(name):
    edit, noop = edit_cases.CONTRACTS[name]
    testing.check_edit(edit, noop=noop)


@pytest.mark.parametrize("name", kv_oracle.CONTRACTS)
def test_selector(name):
    make, settings = kv_oracle.CONTRACTS[name]
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
