"""Train a drafter on responses.

The package can be called: `dpace.train(...)` is the function, also once the package of that name is loaded.
"""

import inspect
import sys
from types import ModuleType

from dpace.train.run import make_datasets, train


class _TrainPackage(ModuleType):
    """A package that can be called as its function `train`."""

    __call__ = staticmethod(train)
    __signature__ = inspect.signature(train)


sys.modules[__name__].__class__ = _TrainPackage
