"""Steering: edits of attention, the choice of heads and settings, and the test whether an edit helps.

Every public class and function of the files in this folder is an attribute of the package.
"""

from interp.analyses.exports import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
