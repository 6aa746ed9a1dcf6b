"""Find the attention heads that matter, test whether they do, and steer them; on long contexts, on the model you run.

Names are imported when they are first used, so that `import interp` is quick. They are listed in `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
