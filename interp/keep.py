"""interp.hooks.read.keep by the name that interp has for it."""

from interp.aliases import alias
from interp.hooks.read.keep import *  # noqa: F403

alias(__name__, "interp.hooks.read.keep")
