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
    from interp.analyses.causal import causal_check as causal_check
    from interp.analyses.curve import causal_curve as causal_curve
    from interp.analyses.explore import explore as explore
    from interp.analyses.scores import HeadScores as HeadScores
    from interp.analyses.sweep import sweep as sweep
    from interp.hooks import keep as keep
    from interp.hooks.bridge import bridge as bridge
    from interp.hooks.capture import capture as capture
    from interp.hooks.doctor import doctor as doctor
    from interp.hooks.edit import steering as steering
    from interp.hooks.heads import Head as Head
    from interp.hooks.heads import HeadLayout as HeadLayout
    from interp.hooks.heads import HeadSet as HeadSet
    from interp.hooks.outputs import Intervention as Intervention
    from interp.hooks.outputs import ablate as ablate
    from interp.hooks.prompts import Prompts as Prompts
    from interp.kernels.errors import InterpError as InterpError
    from interp.models import load as load
    from interp.report import make_report as make_report

__version__ = "0.1.0"

# name -> the module that holds it
_HOMES = {
    "Head": "interp.hooks.heads",
    "HeadLayout": "interp.hooks.heads",
    "HeadScores": "interp.analyses.scores",
    "HeadSet": "interp.hooks.heads",
    "InterpError": "interp.kernels.errors",
    "Intervention": "interp.hooks.outputs",
    "Prompts": "interp.hooks.prompts",
    "ablate": "interp.hooks.outputs",
    "bridge": "interp.hooks.bridge",
    "capture": "interp.hooks.capture",
    "causal_check": "interp.analyses.causal",
    "causal_curve": "interp.analyses.curve",
    "doctor": "interp.hooks.doctor",
    "explore": "interp.analyses.explore",
    "steering": "interp.hooks.edit",
    "sweep": "interp.analyses.sweep",
    "load": "interp.models",
    "make_report": "interp.report",
}
_MODULES = {
    "identify": "interp.analyses.identify",
    "keep": "interp.hooks.keep",
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
    "causal_check",
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
