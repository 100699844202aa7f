"""Other projects' implementations, without what their packages import; `make peers` installs them.

Each is read from its file as it is, or "in double": with float64 wherever it says float32.
"""

import __future__

import ast
import importlib
import importlib.metadata
import importlib.util
import math
import sys
import types
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers


def load_file(package: str, path: str) -> types.ModuleType:
    """A file that imports nothing of its own package."""
    spec = importlib.util.spec_from_file_location(f"peer_{path}", _find(package, path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_functions(package: str, double: bool, *places: str) -> types.SimpleNamespace:
    """Single functions, "path:name" each, which may call each other."""
    found = {}
    for path, name in (place.split(":") for place in places):
        tree = ast.parse(_source(_find(package, path), double))
        found[name] = next(
            x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == name
        )
        found[name].decorator_list = []
    einops = importlib.import_module("einops")
    space = {"torch": torch, "F": F, "math": math, "repeat": einops.repeat}
    space["rearrange"] = einops.rearrange
    flags = __future__.annotations.compiler_flag  # types in signatures are not looked up
    body = ast.Module(list(found.values()), [])
    exec(compile(body, f"<{package}>", "exec", flags), space)
    return types.SimpleNamespace(**{name: space[name] for name in found})


def names_given_weights(package: str, path: str, layer: str) -> set[str]:
    """Attributes of a class that its constructor gives a parameter, a linear map or a norm."""
    tree = ast.parse(_find(package, path).read_text())
    body = next(x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == layer)
    names = set()
    for node in ast.walk(body):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)
            if called in ("nn.Parameter", "nn.Linear", "RMSNormGated"):
                names |= {ast.unparse(target).removeprefix("self.") for target in node.targets}
    return names


def load_config(name: str) -> type:
    """A configuration of transformers, if the one installed has it."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


@cache
def load_transformers(name: str, double: bool) -> types.ModuleType:
    """The module ``transformers.models.{name}.modeling_{name}``, without the kernels of others.

    It would call them wherever their packages are installed, on a CPU too.
    """
    path = f"transformers.models.{name}"
    spec = importlib.util.find_spec(f"{path}.modeling_{name}")
    module = types.ModuleType(f"{path}.modeling_{name}_{'double' if double else 'plain'}")
    module.__package__, module.__file__ = path, spec.origin
    tree = ast.parse(_source(Path(spec.origin), double))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    sys.modules[module.__name__] = module  # dataclasses look themselves up
    exec(compile(tree, spec.origin, "exec"), vars(module))
    return module


def _find(package: str, path: str) -> Path:
    try:
        return Path(importlib.metadata.distribution(package).locate_file(path))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: make peers")


def _source(path: Path, double: bool) -> str:
    text = path.read_text()
    if double:
        text = text.replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    return text
