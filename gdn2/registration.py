"""Makes transformers' Auto classes know gdn2, at the moment when they are themselves imported.

Neither ``import gdn2`` nor ``gdn2 --help`` pays for importing transformers, and yet
``import gdn2; AutoModelForCausalLM.from_pretrained(folder)`` works. Our modules register their
own classes; what is left to do is to import them, each as soon as it can be.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

# transformers may import AutoConfig when its model classes, which ours inherit from, are half-way.
REGISTERED_BY = {
    "transformers.models.auto.configuration_auto": "gdn2.models.configuration",
    "transformers.models.auto.modeling_auto": "gdn2.models.modeling",
}


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register(REGISTERED_BY[self.name])


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTERED_BY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def register() -> None:
    """Register with what transformers has imported, and with the rest when it is (if ever)."""
    for theirs, ours in REGISTERED_BY.items():
        if theirs in sys.modules:
            _register(ours)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(module: str) -> None:
    try:
        import_module(module)
    except ImportError as error:  # a transformers that is too old still serves other models
        warnings.warn(f"transformers' Auto classes will not know gdn2: {error}", stacklevel=2)
