"""Steering methods, edits to be added up and opened by `interp.steering`; which heads to steer, and does it help."""

from interp.analyses.steer.act import Act
from interp.analyses.steer.check import steer_check
from interp.analyses.steer.found_in_the_middle import FoundInTheMiddle
from interp.analyses.steer.iti import iti
from interp.analyses.steer.key_scale import KeyScale
from interp.analyses.steer.offset import Offset
from interp.analyses.steer.pasta import Pasta
from interp.analyses.steer.profile import Profile, choose, directions, intersection, profile
from interp.analyses.steer.redistribute import Redistribute
from interp.analyses.steer.relatives import Boost, Gate, Knockout, SpotLight, Temperature
from interp.analyses.steer.slot_bias import slot_bias
from interp.analyses.steer.zerotuning import ZeroTuning
from interp.hooks.edit.edit import Edits

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
    "Profile",
    "Redistribute",
    "SpotLight",
    "Temperature",
    "ZeroTuning",
    "choose",
    "directions",
    "intersection",
    "iti",
    "profile",
    "slot_bias",
    "steer_check",
]
