"""The official client, as it was when vLLM first needed one and as it is, does all that the dialect's table says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.videos.dialect import FakeJobs, make_app, served
from tests.videos.official import ROWS
from tests.videos.pictures import PNG

ROOT = Path(__file__).parents[2]
OLDEST = "2.25.0"
"""The oldest client that vLLM's own requirements allow."""


@pytest.fixture(scope="module", params=["installed", OLDEST])
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """Where that version is; None: it is the installed one."""
    if request.param == "installed":
        return None
    folder = tmp_path_factory.mktemp("openai")
    # Everything else that it needs is there.
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    wanted = [f"openai=={request.param}", "distro"]
    try:
        done = subprocess.run([*install, "--target", str(folder), *wanted], capture_output=True, text=True, timeout=120)
        failed = done.stderr if done.returncode else None
    except subprocess.TimeoutExpired:
        failed = "the registry does not answer"
    if failed is not None:
        pytest.skip(f"NOT TESTED: openai {request.param} cannot be installed: {' '.join(failed.split())[-200:]}")
    return str(folder)


@pytest.fixture(scope="module")
def jobs(version: str | None, tmp_path_factory: pytest.TempPathFactory) -> FakeJobs:
    return FakeJobs(tmp_path_factory.mktemp("store"), at_once=True)


@pytest.fixture(scope="module")
def shown(version: str | None, jobs: FakeJobs) -> dict[str, Any]:
    """What the client makes of every row."""
    path = [str(ROOT)] if version is None else [version, str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    with served(make_app(jobs)) as url:
        command = [sys.executable, "-m", "tests.videos.official", url]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_table(shown: dict[str, Any], row: str) -> None:
    assert shown["rows"][row] == "shown"


def test_it_is_the_version_that_was_meant(shown: dict[str, Any], version: str | None) -> None:
    assert (shown["version"] == OLDEST) == (version is not None)


def test_what_it_sends_of_a_picture_arrives(shown: dict[str, Any], jobs: FakeJobs) -> None:
    """The first two requests: a file, and brackets with a data URL."""
    first, second = jobs.bodies[:2]
    assert (first.picture, second.picture) == (PNG, PNG)
    assert (first.size, first.seconds, first.seed) == ((720, 1280), 8, 3)
    assert (first.guidance_scale, first.negative_prompt) == (2.5, "rain")


def test_the_table_has_these_rows() -> None:
    text = (ROOT / "docs" / "videos.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `((?:GET|POST|DELETE) [^`]+)` \|", text, flags=re.MULTILINE)
    assert table == [row for row in ROWS if row != "errors"]
