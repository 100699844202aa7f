"""The checks at a commit are those of `make check` and three more, pinned, and nobody's duty."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
HOOKS = [
    hook
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repo["hooks"]
]
MAKEFILE = (ROOT / "Makefile").read_text()
PACKAGES = {
    "ruff": "ruff",
    "mypy": "mypy",
    "codespell": "codespell",
    "check-added-large-files": "pre-commit-hooks",
    "check-merge-conflict": "pre-commit-hooks",
}


def target(name: str) -> str:
    """The rule of a target, from its first line on."""
    return re.search(rf"^{name}:.*\n(?:\t.*\n)*", MAKEFILE, re.MULTILINE)[0]


def test_every_hook_comes_from_the_environment_with_a_pinned_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {re.match(r"[\w-]+", line)[0] for line in extras["dev"] + extras["hooks"]}
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for hook in HOOKS:
        folder, _, tool = hook["entry"].split()[0].rpartition("/")
        assert folder == ".venv/bin"
        assert PACKAGES[tool] in names & pinned
    assert {"pre-commit", *PACKAGES.values()} <= names & pinned


def test_the_hooks_check_what_make_checks():
    commands = {" ".join(hook["entry"].split()[:2]) for hook in HOOKS}
    for command in re.findall(r"\$\(BIN\)/(\w+(?: \w+)?)", target("check")):
        assert f".venv/bin/{command}" in commands


def test_installing_leaves_git_alone():
    assert "pre-commit install" in target("hooks")
    assert MAKEFILE.count("pre-commit") == target("hooks").count("pre-commit")
