"""Makes transformers' Auto classes know gdn2, at the moment when they are themselves imported.

Neither ``import gdn2`` nor ``gdn2 --help`` pays for importing transformers, and yet
``import gdn2; AutoModelForCausalLM.from_pretrained(folder)`` works.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

AUTO_CLASSES = "transformers.models.auto.modeling_auto"


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        import_module("gdn2.models")  # registers


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_CLASSES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def register() -> None:
    """Register with transformers if it is imported, else as soon as it is (if it ever is)."""
    if AUTO_CLASSES in sys.modules:
        import_module("gdn2.models")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
