# names at the top of the package, for type checkers and for interp/__init__.py, which imports them when they are used
from . import identify as identify
from . import keep as keep
from . import kv as kv
from . import plots as plots
from . import steer as steer
from . import tasks as tasks
from . import views as views
from .analyses.causal.ablation_test import ablation_test as ablation_test
from .analyses.causal.causal_profile import causal_profile as causal_profile
from .analyses.causal.curve import causal_curve as causal_curve
from .analyses.causal.set_difference import set_difference as set_difference
from .analyses.causal.sweep import sweep as sweep
from .analyses.pruning import pruning_curve as pruning_curve
from .analyses.results.head_scores import HeadScores as HeadScores
from .analyses.results.trials import Trials as Trials
from .analyses.views.explore import explore as explore
from .errors import InterpError as InterpError
from .hooks.doctor.doctor import doctor as doctor
from .hooks.edit.ablation import Intervention as Intervention
from .hooks.edit.ablation import ablate as ablate
from .hooks.edit.edit import steering as steering
from .hooks.model.heads import Head as Head
from .hooks.model.heads import HeadLayout as HeadLayout
from .hooks.model.heads import HeadSet as HeadSet
from .hooks.prompts.prompts import Prompts as Prompts
from .hooks.read.capture import capture as capture
from .hooks.transformerlens.bridge import bridge as bridge
from .models.load import load as load
from .report import make_report as make_report
from .runs.run import Run as Run

__all__: list[str]
__version__: str
