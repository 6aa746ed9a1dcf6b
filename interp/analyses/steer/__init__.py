"""Steering methods: each an edit, to be added to others and opened by `interp.steering`."""

from interp.analyses.steer.act import Act
from interp.analyses.steer.iti import iti
from interp.analyses.steer.keyscale import KeyScale
from interp.analyses.steer.middle import FoundInTheMiddle
from interp.analyses.steer.offset import Offset
from interp.analyses.steer.pasta import Pasta
from interp.analyses.steer.redistribute import Redistribute
from interp.analyses.steer.relatives import Boost, Gate, Knockout, SpotLight, Temperature
from interp.analyses.steer.slots import slot_bias
from interp.analyses.steer.zerotuning import ZeroTuning
from interp.hooks.edit import Edits

__all__ = [
    "Act",
    "Boost",
    "Edits",
    "FoundInTheMiddle",
    "Gate",
    "KeyScale",
    "Knockout",
    "Offset",
    "Pasta",
    "Redistribute",
    "SpotLight",
    "Temperature",
    "ZeroTuning",
    "iti",
    "slot_bias",
]
