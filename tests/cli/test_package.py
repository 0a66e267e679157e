"""What the distribution says of itself, and what it needs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from vllm_packcache.tools.console import FROM_EXTRAS

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


EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
ROOMS = {"calibrate": "calibrate", "demo": "demo", "reference": "calibrate", "serving": "generate"}
"""Rooms of the package that need an extra; all others are the server's."""
DRAWING = ("tools/explain.py", "tools/figures.py")
"""Of a room without an extra: they import what draws where a picture is asked for."""


def brought(extra: str | None) -> set[str]:
    """Distributions that the package has with an extra, without one if it is None."""
    lines = PROJECT["dependencies"] if extra is None else EXTRAS[extra]
    names: set[str] = set()
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            names = names.union(*map(brought, requirement.extras))
        else:
            names.add(normal(requirement.name))
    return names if extra is None else names | brought(None)


def extra_of(file: str) -> str | None:
    inside = file.removeprefix("vllm_packcache/")
    return "calibrate" if inside in DRAWING else ROOMS.get(inside.partition("/")[0])


def test_a_room_imports_what_its_extra_brings_and_a_server_what_every_installation_has() -> None:
    distributions = packages_distributions()
    strangers = {
        (module, file)
        for module, file in imported()
        if module not in WITH_TORCH
        and not {normal(name) for name in [*distributions.get(module, ()), module]} & brought(extra_of(file))
    }
    assert strangers == set()


def test_what_only_extras_bring_is_known_to_the_command_line() -> None:
    distributions = packages_distributions()
    modules = {
        module
        for module, _ in imported()
        if {normal(name) for name in [*distributions.get(module, ()), module]} & (brought("all") - brought(None))
    }
    assert modules == FROM_EXTRAS


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (["demo"], "psutil", "demo"),
        (["demo-masked"], "psutil", "demo"),
        (["generate", "--prompt", "x", "--tokenizer", ".", "--out", "x.mp4"], "psutil", "generate"),
        (["calibrate", "--out", "x.yaml", "--plot", "x.png"], "matplotlib", "calibrate"),
        (["explain", "--out", "x.png"], "matplotlib", "calibrate"),
    ],
)
def test_a_missing_extra_is_one_sentence_that_names_it(
    arguments: list[str], module: str, extra: str, tmp_path: Path
) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from vllm_packcache.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.splitlines() == [
        f"vllm-packcache: {module} is not installed, which this command needs: pip install 'vllm-packcache[{extra}]'"
    ]
    assert not list(tmp_path.iterdir())


def test_every_import_is_a_declared_dependency_and_every_dependency_is_imported() -> None:
    declared = brought("all")
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


def test_importing_the_package_waits_for_nothing_and_every_name_is_there() -> None:
    import vllm_packcache

    code = "import sys, vllm_packcache; print([m for m in ('numpy', 'torch', 'vllm') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
    for name in vllm_packcache.__all__:
        assert getattr(vllm_packcache, name) is not None
