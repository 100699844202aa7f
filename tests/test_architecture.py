"""The direction of imports: nothing below knows the name of anything above."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gdn2"
# A part may import itself and what is listed.
MAY_IMPORT = {
    "ops": set(),
    "modules": {"ops"},
    "layers": {"ops", "modules"},
    "models": {"ops", "modules", "layers"},
    "data": set(),
    "train": {"models", "data"},
    "evals": {"models", "data"},
    "presets": {"models", "data", "train", "evals"},
    "registration": {"models"},
    "compare": {"models", "train"},
    "cli": {"models", "data", "train", "evals", "presets", "compare"},
    "__init__": {"registration"},
}
# What a part may import beside torch and the standard library. Extras are in pyproject.toml.
LIBRARIES = {
    "ops": set(),
    "modules": set(),
    "layers": set(),
    "models": {"transformers", "safetensors"},
    "data": {"numpy", "pyarrow", "tokenizers", "rich", "backports", "compression"},
    "train": {"numpy", "rich", "matplotlib", "safetensors", "transformers"},
    "evals": {"numpy", "rich", "matplotlib", "tokenizers", "transformers"},
    "presets": set(),
    "registration": {"transformers"},
    "compare": {"rich"},
    "cli": {"rich"},
    "__init__": set(),
}


ONLY_IN = {"triton": PACKAGE / "ops" / "triton"}


def parts() -> list[tuple[str, Path]]:
    return [(f.relative_to(PACKAGE).parts[0].removesuffix(".py"), f) for f in PACKAGE.rglob("*.py")]


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("part", "path"), parts(), ids=lambda x: x.name if isinstance(x, Path) else x
)
def test_imports_point_downwards(part, path):
    assert part in MAY_IMPORT, f"{path}: a new part needs its place in the order"
    for name in imported_modules(path):
        top, _, rest = name.partition(".")
        if top == "gdn2":
            target = rest.partition(".")[0]
            assert target in MAY_IMPORT[part] | {part, "", "__version__"}, f"{path} imports {name}"
        elif top in ONLY_IN:
            assert path.is_relative_to(ONLY_IN[top]), f"{path} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert top in LIBRARIES[part] | {"torch"}, f"{path} imports {name}"


def test_evaluation_and_training_do_not_know_each_other():
    assert "train" not in MAY_IMPORT["evals"]
    assert "evals" not in MAY_IMPORT["train"]


@pytest.mark.parametrize("path", [f for _, f in parts()], ids=lambda f: f.name)
def test_modules_stay_small(path):
    assert len(path.read_text().splitlines()) <= 500, f"{path}: think of its parts"
