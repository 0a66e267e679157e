"""What the distribution says of itself, and what it needs."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Torch brings it where there is a GPU, under another name for AMD's, and pins it.
WITH_TORCH = {"triton"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> Iterator[tuple[str, str]]:
    """Third-party modules and the files that import them, also in functions."""
    for path in (ROOT / "vllm_packcache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names}:
                if name not in sys.stdlib_module_names and name != "vllm_packcache":
                    yield name, str(path.relative_to(ROOT))


def test_every_import_is_a_declared_dependency_and_every_dependency_is_imported() -> None:
    declared = {normal(Requirement(line).name) for line in PROJECT["dependencies"]}
    distributions = packages_distributions()
    undeclared, used = {}, set()
    for module, file in imported():
        # The CPU build of vLLM has another name.
        names = {normal(name) for name in [*distributions.get(module, ()), module]}
        used |= names & declared
        if not names & declared and module not in WITH_TORCH:
            undeclared[module] = file
    assert undeclared == {}
    assert used == declared


def test_classifiers_name_the_versions_of_python_that_it_is_for() -> None:
    minors = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"])
    assert minors is not None
    named = [line.rpartition(".")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert named == [str(minor) for minor in range(int(minors[1]), int(minors[2]))]


def test_the_change_log_begins_with_what_is_not_released_and_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert versions[1] == PROJECT["version"]
