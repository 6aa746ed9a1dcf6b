"""Views: what heads attend to and write, as data for figures and reports.

Every public class and function of the files in this folder is an attribute of the package.
"""

from interp.analyses.exports import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
