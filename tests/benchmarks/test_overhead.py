"""The command works at a small size, and the clock counts what is ours and nothing else."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.decode.samples import CLOCKS, ratios_of
from benchmarks.overhead import clock as clocks
from benchmarks.overhead.benchmark import OVERHEAD, targets
from benchmarks.overhead.clock import HostClock
from benchmarks.overhead.plan import CASES, STOCK, WITH_PLUGIN
from benchmarks.report.markdown import Files

# Six engines are started, each with an import of vLLM: what needs no engine is in the suite.
engines = pytest.mark.long


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    path: Path = tmp_path_factory.mktemp("overhead") / "overhead.json"
    file = io.StringIO()
    result = OVERHEAD.run(path, quick=True, console=Console(file=file, width=120))
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    return result, file.getvalue()


@engines
def test_every_case_is_compared_with_stock(measured):
    result, printed = measured
    assert set(result["ratios"]) == {f"{case} / {STOCK}" for case in CASES if case != STOCK}
    assert all(len(result["cpu_seconds"][case]) == result["rounds"] for case in CASES)
    assert [target["met"] for target in result["targets"]] == [None, None], "times of a quick run are not judged"
    assert all(name in printed for name in CASES.values())


@engines
@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_time_inside_our_functions_is_found_on_both_runners(measured, runner):
    for case in WITH_PLUGIN:
        own = measured[0]["host"][runner][case]
        assert own["microseconds_per_step"]["median"] > 0
        assert any(name.startswith("RetentionManager.cache_blocks") for name in own["functions"])


def test_the_clock_stands_still_in_what_ours_calls(monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(clocks.time, "perf_counter_ns", lambda: next(now))
    clock = HostClock()

    def theirs() -> str:
        return "done"

    inner = clock.theirs(theirs)

    def own() -> str:
        return inner()

    outer = clock.ours(own)
    assert inner() == "done", "called by vLLM, it is none of our business"
    assert clock.take() == {}
    assert clock.ours(outer)() == "done"
    (counted,) = clock.take().values()
    assert counted == 20, "from the call to theirs, and from there to the end"


def judged(*, room: list[float], packcache: list[float], quick: bool = False) -> list[bool | None]:
    """Verdicts on samples against stock's of 2, 4 and 8 ms a step: the machine gets slower, both engines alike."""
    own = {STOCK: [0.002, 0.004, 0.008], "room": room, "packcache": packcache}
    ratios = ratios_of(
        dict.fromkeys(CLOCKS, own), {f"{case} / {STOCK}": (case, STOCK) for case in ("room", "packcache")}
    )
    return [target["met"] for target in targets({"quick": quick, "ratios": ratios})]


def test_the_median_over_rounds_is_judged():
    assert judged(room=[0.0021, 0.0043, 0.02], packcache=[0.0024, 0.0049, 0.03]) == [True, True]
    assert judged(room=[0.0021, 0.0045, 0.02], packcache=[0.0024, 0.0051, 0.03]) == [False, False]
    assert judged(room=[0.9] * 3, packcache=[0.9] * 3, quick=True) == [None, None]


@engines
def test_the_report_has_a_part_of_it(measured, tmp_path):
    result = measured[0]
    files = Files(tmp_path, tmp_path)
    text = "\n".join(map(str, OVERHEAD.report.long(result, files)))
    assert all(name in text for name in CASES.values())
    rows = list(OVERHEAD.report.rows(result))
    functions = [own["functions"] for cases in result["host"].values() for own in cases.values()]
    assert sum(row.measure.startswith("in ") and "mean of steps" in row.measure for row in rows) >= sum(
        map(len, functions)
    )
    assert [goal.verdict for goal in OVERHEAD.report.goals(result)] == ["not judged"] * 2
    assert "overhead.json" in "\n".join(map(str, OVERHEAD.report.short(result, files)))
