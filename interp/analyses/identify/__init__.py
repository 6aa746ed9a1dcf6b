"""Methods that find heads, one published method in each file: `f(model, prompts, **settings) -> HeadScores`.

Methods that compare two kinds of prompts take both, such as patching: `f(model, clean, corrupt, metric, **settings)`.
Every public class and function of the files in this folder is an attribute of the package.
"""

from interp.analyses.exports import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
