"""The support table of `docs/operate.md` is what `tests.support` says, and that names tests that there are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import vllm
from packaging.version import Version

from tests.support import FORMATS_SHOWN_BY, INSTALLED, SUPPORT, Support, formats, table
from vllm_packcache.config.formats import FORMATS
from vllm_packcache.hooks.install import supported_vllm
from vllm_packcache.worker.keys.layout import BACKENDS

TESTS = Path(__file__).parents[1]


def test_the_guide_shows_it() -> None:
    assert table() in (TESTS.parent / "docs" / "operate.md").read_text(encoding="utf-8"), "see python -m tests.support"


def test_the_guide_shows_formats() -> None:
    guide = (TESTS.parent / "docs" / "configure.md").read_text(encoding="utf-8")
    assert formats() in guide, "see python -m tests.support"


def test_formats_that_are_run_have_tests() -> None:
    run = {(own.name, keeper.backend) for own in FORMATS.values() for keeper in own.keepers if keeper.shown}
    assert run == set(FORMATS_SHOWN_BY)


def test_versions_are_those_that_are_tested() -> None:
    assert Version(vllm.__version__).public == INSTALLED
    assert all(supported_vllm().contains(row.vllm) for row in SUPPORT)


def test_every_backend_and_runner_is_in_it() -> None:
    rows = [row for row in SUPPORT if row.vllm == INSTALLED]
    assert {backend for row in rows for backend in row.backends.split(", ")} == set(BACKENDS)
    assert {runner for row in rows for runner in row.runners.split(", ")} == {"V1", "V2"}


@pytest.mark.parametrize("row", SUPPORT, ids=lambda row: f"{row.vllm} {row.runners} {row.backends}")
def test_what_shows_it_exists(row: Support) -> None:
    check_there(row.shown_by)


@pytest.mark.parametrize("names", FORMATS_SHOWN_BY.values(), ids=map(" ".join, FORMATS_SHOWN_BY))
def test_what_shows_a_format_exists(names: tuple[str, ...]) -> None:
    check_there(names)


def check_there(names: tuple[str, ...]) -> None:
    """Check that there are these tests, ``file`` or ``file::test``."""
    for name in names:
        file, _, test = name.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        tests = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and "test_" in node.name]
        assert test in tests if test else tests
