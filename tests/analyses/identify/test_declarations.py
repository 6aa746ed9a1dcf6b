"""Declarations of the methods: names from the files, sections and settings that lists print, and examples that run."""

import importlib
import subprocess
import sys

import pytest

from interp.analyses import identify, registry
from interp.errors import UsageError

METHODS = [entry for entry in registry.entries() if entry.thing.__module__.startswith("interp.analyses.identify.")]
REPORT = (
    "retrieval", "induction", "previous_token", "duplicate_token", "sinks", "razor_induction", "razor_echo",
    "positional", "semantic_retrieval", "retrieval_reasoning", "lookback", "task_kv", "qada", "qrhead", "qk_score",
    "concept_induction", "context_entropy", "attention_tracker", "function_vectors", "duo_gates",
    "gradient_importance", "activation_patching", "path_patching", "attribution_patching", "logit_attribution",
)  # fmt: skip
HELPERS = {
    "duo_heads", "function_vector", "heterogeneous", "razor_protected", "gate_shares", "focus", "detect", "by_layer",
}  # fmt: skip


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_an_entry_has_all_that_a_list_prints(entry):
    assert entry.title
    assert entry.group
    assert entry.cost is not None or entry.prompts is None or entry.needs
    for section in ("summary", "args", "returns", "source", "limits"):
        assert entry.sections.get(section), section
    assert entry.sections["summary"].endswith(".")
    missing = [name for name, setting in entry.settings.items() if not setting.help]
    assert not missing
    assert "Cannot show" not in (entry.thing.__doc__ or "")
    fixed = {name: value for name, value in entry.run_settings.items() if not str(value).startswith("$")}
    entry.check_settings({name: value for name, value in fixed.items() if name in entry.settings})
    assert entry.run_settings.keys() <= {*entry.settings, "batch_size"}


def test_methods_come_in_the_order_of_a_report():
    assert [entry.name for entry in METHODS if entry.name in REPORT] == list(REPORT)
    assert [entry.name for entry in registry.analyses_named("basic")] == list(REPORT[:5])
    long = "retrieval,razor_induction,razor_echo,semantic_retrieval,retrieval_reasoning,task_kv,qada,qrhead,duo_gates"
    assert ",".join(entry.name for entry in registry.analyses_named("long")) == long


def test_a_file_offers_the_function_of_its_name():
    assert {entry.name for entry in METHODS} <= set(identify.__all__)
    assert HELPERS <= set(identify.__all__) <= set(dir(identify))
    for name in identify.__all__:
        assert callable(getattr(identify, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'; choose from GateShares"):
        identify.nothing  # noqa: B018


def test_a_module_that_shares_its_name_with_a_function_leaves_the_function_in_place():
    module = importlib.import_module("interp.analyses.identify.retrieval")
    assert identify.retrieval is module.retrieval
    code = (
        "import interp.analyses.identify.sinks; from interp.identify import sinks;"
        "from interp.analyses import identify;"
        "assert callable(sinks) and identify.sinks is sinks"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_names_are_known_before_anything_is_imported():
    code = (
        "import sys; from interp.analyses import identify; assert 'retrieval' in dir(identify);"
        "assert not [name for name in sys.modules if name.startswith('interp.analyses.identify.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_unknown_setting_is_refused_with_the_nearest_one():
    with pytest.raises(UsageError, match=r"qada has no setting 'taw' \(did you mean 'tau'\?\); it has"):
        registry.get("qada").check_settings({"taw": 0.9})


def test_an_analysis_declared_in_this_process_can_be_named_in_a_plan():
    @registry.analysis(title="Mine", group="find", prompts=registry.get("sinks").prompts)
    def declared_here(model, prompts):
        """Score of a notebook."""

    assert [entry.name for entry in registry.analyses_named("sinks,declared_here")] == ["sinks", "declared_here"]
