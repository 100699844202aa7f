"""The wheel installs, and its core needs torch and nothing else."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CORE = """
import sys
import torch
import gdn2, gdn2.ops, gdn2.modules, gdn2.layers
from gdn2.layers import GatedDeltaNet2

layer = GatedDeltaNet2(hidden_size=16, num_heads=2, head_k_dim=8, head_v_dim=8)
y, state = layer(torch.randn(1, 5, 16))
y.sum().backward()
assert y.shape == (1, 5, 16)
extras = {"transformers", "numpy", "pyarrow", "rich", "matplotlib", "tokenizers"} & set(sys.modules)
assert not extras, extras
print(gdn2.__version__, gdn2.__file__)
"""


def requirements(name: str) -> set[str]:
    """A distribution and everything that it requires, extras aside."""
    found, todo = set(), [name]
    while todo:
        distribution = todo.pop()
        if distribution in found:
            continue
        found.add(distribution)
        for line in importlib.metadata.requires(distribution) or []:
            requirement, _, marker = line.partition(";")
            required = re.match(r"[\w.-]+", requirement)[0]
            try:
                importlib.metadata.distribution(required)
            except importlib.metadata.PackageNotFoundError:
                continue
            if "extra" not in marker:
                todo.append(required)
    return found


def copy_source(target: Path) -> None:
    """The checkout without what git ignores: setuptools puts all of an old build/ into a wheel."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info")
        shutil.copytree(ROOT, target, ignore=ignored)
        return
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A Python that has the built wheel and torch with its requirements, by links, and no more."""
    root = tmp_path_factory.mktemp("bare")
    source, wheels = root / "source", root / "wheels"
    copy_source(source)
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, source]
    subprocess.run([sys.executable, "-m", "pip", *map(str, build)], check=True)
    venv.create(root / "venv", symlinks=True)
    site = next((root / "venv").glob("lib/python*/site-packages"))
    for name in requirements("torch"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    (wheel,) = wheels.iterdir()
    install = ["install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([sys.executable, "-m", "pip", *map(str, install)], check=True)
    return root / "venv" / "bin" / "python"


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess:
    # From another folder and in isolation, so that the checkout itself is not importable.
    command = [python, "-I", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)


def test_core_needs_torch_alone(bare_python):
    done = run(bare_python, "-c", CORE)
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("prepare stdlib --out data", "data"),
        ("train debug --data data --out run", "train"),
        ("info gdn2_1p3b", "train"),
        ("eval run", "eval"),
        ("generate run --prompt a", "eval"),
    ],
)
def test_missing_extra_fails_with_the_install_command(bare_python, command, extra):
    done = run(bare_python, "-m", "gdn2.cli", *command.split())
    assert done.returncode == 2
    assert f"pip install 'gdn2[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_works_without_any_extra(bare_python):
    done = run(bare_python, "-m", "gdn2.cli", "--help")
    assert done.returncode == 0
    assert "prepare" in done.stdout


def test_wheel_holds_the_package_alone(bare_python):
    site = bare_python.parents[1] / next(iter(bare_python.parents[1].glob("lib/*/site-packages")))
    files = next(site.glob("gdn2-*.dist-info/RECORD")).read_text()
    assert "gdn2/py.typed" in files
    assert "LICENSE" in files
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gdn2").rglob("*.py")}
    assert set(re.findall(r"^(gdn2/.*\.py),", files, re.MULTILINE)) == sources
    assert not re.search(r"^(tests|recipes|benchmarks)/", files, re.MULTILINE)
