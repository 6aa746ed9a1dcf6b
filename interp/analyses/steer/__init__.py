"""Steering methods: each an edit, to be added to others and opened by `interp.steering`."""

from interp.analyses.steer.act import Act
from interp.analyses.steer.pasta import Pasta
from interp.analyses.steer.relatives import Boost, Gate, Knockout, SpotLight, Temperature
from interp.analyses.steer.zerotuning import ZeroTuning
from interp.hooks.edit import Edits

__all__ = ["Act", "Boost", "Edits", "Gate", "Knockout", "Pasta", "SpotLight", "Temperature", "ZeroTuning"]
