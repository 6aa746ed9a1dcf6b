"""interp.analyses.steer by the name that interp has for it."""

from interp.aliases import alias
from interp.analyses.steer import *  # noqa: F403

alias(__name__, "interp.analyses.steer")
