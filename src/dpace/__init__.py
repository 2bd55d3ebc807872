"""Train parallel drafters with D-PACE and decode Hugging Face causal LMs faster, with the same text.

The names of `__init__.pyi` are loaded when they are first used, so that `import dpace` takes no time.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
