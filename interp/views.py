"""interp.analyses.views by the name that interp has for it."""

from interp.aliases import alias
from interp.analyses.views import *  # noqa: F403

alias(__name__, "interp.analyses.views")
