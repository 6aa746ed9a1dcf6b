"""interp.hooks.keep by the name that interp has for it."""

from interp.aliases import alias
from interp.hooks.keep import *  # noqa: F403

alias(__name__, "interp.hooks.keep")
