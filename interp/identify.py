"""interp.analyses.identify by the name that interp has for it."""

from typing import TYPE_CHECKING, Any

from interp.aliases import alias
from interp.analyses.identify import *  # noqa: F403

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


alias(__name__, "interp.analyses.identify")
