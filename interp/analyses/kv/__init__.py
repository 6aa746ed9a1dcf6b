"""Key selection: which keys of a prompt each kv head keeps, a context that applies a selector, and its evaluation.

Every public class and function of the files in this folder is an attribute of the package.
"""

from interp.analyses.exports import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
