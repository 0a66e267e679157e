"""The command works at its small size: ids are compared, and what is written is what is reported."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from benchmarks.report.markdown import Files
from benchmarks.videos import report
from benchmarks.videos.benchmark import VIDEOS, targets
from benchmarks.videos.plan import QUICK
from benchmarks.videos.runs import API, COMPLETION, ENGINE, VIDEO, WALL
from tests.benchmarks import results


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What `run` returns, what it writes and what it prints."""
    path = tmp_path_factory.mktemp("bench") / "new" / "videos.json"
    environment, children = dict(os.environ), set(psutil.Process().children(recursive=True))
    console = Console(file=io.StringIO(), width=200)
    result = VIDEOS.run(path, quick=True, console=console)
    assert os.environ == environment
    assert set(psutil.Process().children(recursive=True)) <= children
    assert isinstance(console.file, io.StringIO)
    return result, json.loads(path.read_text(encoding="utf-8")), console.file.getvalue()


@pytest.mark.timeout(600)
def test_what_is_written_is_what_was_measured(measured: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    result, written, printed = measured
    assert json.loads(json.dumps(result)) == written
    (own,) = written["overhead"]["rounds"]
    assert all(own[name][clock] > 0 for name in (VIDEO, COMPLETION) for clock in (ENGINE, API, WALL))
    assert own[VIDEO]["decode"] > 0
    assert own[VIDEO]["storage"] > 0
    (followed,) = written["followers"]["rounds"]
    assert set(followed) == {str(count) for count in QUICK.followers}
    assert [target["met"] for target in written["targets"]] == [None]
    assert "not judged" in printed
    assert "2 clients follow its events" in printed


def test_its_goal_is_judged_by_the_median(measured: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    result = results.videos()
    (target,) = targets(result)
    assert (target["value"], target["at_most"], target["met"]) == (1.01, 1.03, True)
    ratios = {"median": 1.04, "quartiles": [1.02, 1.06], "samples": [1.02, 1.04, 1.06]}
    result["overhead"]["ratios"][ENGINE] = ratios
    (target,) = targets(result)
    assert target["met"] is False
    result["targets"] = [target]
    (goal,) = report.goals(result)
    assert goal.verdict == "**MISSED**, within the spread"


def test_every_comparison_is_reported(tmp_path: Path) -> None:
    result = results.videos()
    rows = {(row.name, row.measure): row.value for row in report.rows(result)}
    assert rows["0 clients follow", "a frame"] == 0.5
    assert rows["video", "a frame, decoding, by the clock"] == 0.003
    assert rows["completion", "a frame, by the engine's processor time"] == 0.4
    text = "\n".join(map(str, report.long(result, Files(tmp_path, tmp_path))))
    assert "1 client follows its events" in text
    assert "videos.json" in "\n".join(map(str, report.short(result, Files(tmp_path, tmp_path))))
