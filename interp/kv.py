"""interp.analyses.kv by the name that interp has for it."""

from interp.aliases import alias
from interp.analyses.kv import *  # noqa: F403

alias(__name__, "interp.analyses.kv")
