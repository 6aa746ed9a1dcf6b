"""Read, identify and report the attention heads of causal language models.

Names are imported when they are first used, so that `import interp` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp import plots as plots
    from interp.analyses import identify as identify
    from interp.analyses import steer as steer
    from interp.analyses import tasks as tasks
    from interp.analyses.causal.ablation_test import ablation_test as ablation_test
    from interp.analyses.causal.curve import causal_curve as causal_curve
    from interp.analyses.causal.sweep import sweep as sweep
    from interp.analyses.results.head_scores import HeadScores as HeadScores
    from interp.analyses.views.explore import explore as explore
    from interp.errors import InterpError as InterpError
    from interp.hooks.doctor.doctor import doctor as doctor
    from interp.hooks.edit.ablation import Intervention as Intervention
    from interp.hooks.edit.ablation import ablate as ablate
    from interp.hooks.edit.edit import steering as steering
    from interp.hooks.model.heads import Head as Head
    from interp.hooks.model.heads import HeadLayout as HeadLayout
    from interp.hooks.model.heads import HeadSet as HeadSet
    from interp.hooks.prompts.prompts import Prompts as Prompts
    from interp.hooks.read import keep
    from interp.hooks.read.capture import capture as capture
    from interp.hooks.transformerlens.bridge import bridge as bridge
    from interp.models.load import load as load
    from interp.report import make_report as make_report

__version__ = "0.1.0"

# name -> the module that holds it
_HOMES = {
    "Head": "interp.hooks.model.heads",
    "HeadLayout": "interp.hooks.model.heads",
    "HeadScores": "interp.analyses.results.head_scores",
    "HeadSet": "interp.hooks.model.heads",
    "InterpError": "interp.errors",
    "Intervention": "interp.hooks.edit.ablation",
    "Prompts": "interp.hooks.prompts.prompts",
    "ablate": "interp.hooks.edit.ablation",
    "bridge": "interp.hooks.transformerlens.bridge",
    "capture": "interp.hooks.read.capture",
    "ablation_test": "interp.analyses.causal.ablation_test",
    "causal_curve": "interp.analyses.causal.curve",
    "doctor": "interp.hooks.doctor.doctor",
    "explore": "interp.analyses.views.explore",
    "steering": "interp.hooks.edit.edit",
    "sweep": "interp.analyses.causal.sweep",
    "load": "interp.models.load",
    "make_report": "interp.report",
}
_MODULES = {
    "identify": "interp.analyses.identify",
    "keep": "interp.hooks.read.keep",
    "plots": "interp.plots",
    "steer": "interp.analyses.steer",
    "tasks": "interp.analyses.tasks",
}

__all__ = [  # noqa: RUF022
    "load",
    "Prompts",
    "tasks",
    "Head",
    "HeadSet",
    "HeadLayout",
    "HeadScores",
    "keep",
    "capture",
    "ablate",
    "steer",
    "steering",
    "bridge",
    "identify",
    "sweep",
    "Intervention",
    "ablation_test",
    "causal_curve",
    "explore",
    "plots",
    "make_report",
    "doctor",
    "InterpError",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = import_module(_MODULES[name])
    elif name in _HOMES:
        found = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'interp' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
