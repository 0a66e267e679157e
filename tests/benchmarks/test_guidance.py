"""The command works at a small size, engines are compared on the same streams, and what is interpreted is left out."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from benchmarks.decode.samples import CLOCKS, CPU
from benchmarks.engine_process import Engine
from benchmarks.guidance.benchmark import BOUNDS, GUIDANCE, targets
from benchmarks.guidance.plan import FULL, LAST, NAMES, QUICK, RATIOS, TEXTS, VIDEOS, additional_config
from benchmarks.guidance.report import WORDS, named
from benchmarks.guidance.runs import Bench, InterpretedEngine
from benchmarks.report.markdown import Files
from tests.benchmarks import results
from vllm_packcache.config.server import ServerConfig

# Six engines are started, each with an import of vLLM: what needs no engine is in the suite.
engines = pytest.mark.long


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    path: Path = tmp_path_factory.mktemp("guidance") / "guidance.json"
    file = io.StringIO()
    result = GUIDANCE.run(path, quick=True, console=Console(file=file, width=200))
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    return result, file.getvalue()


@engines
def test_every_stage_is_measured(measured: tuple[dict[str, Any], str]) -> None:
    result, printed = measured
    for stage, ratios in RATIOS.items():
        found, rounds = result["stages"][stage], QUICK.geometry(stage).rounds
        assert set(found["ratios"]) == set(ratios)
        for clock in CLOCKS:
            assert set(found[clock]) == {name for pair in ratios.values() for name in pair}
            assert all(len(samples) == rounds and min(samples) > 0 for samples in found[clock].values())
    assert [target["met"] for target in result["targets"]] == [None] * len(BOUNDS), "a quick run is not judged"
    assert all(words in printed for words in WORDS.values())


@pytest.mark.parametrize("plan", [FULL, QUICK], ids=["full", "quick"])
def test_engines_are_compared_on_the_same_streams(plan: Any, tmp_path: Path) -> None:
    """Each guided request's streams are the prompts of two others, and no server refuses them."""
    bench = Bench(plan, tmp_path, Console(file=io.StringIO()))
    for stage in RATIOS:
        geometry = plan.geometry(stage)
        separate, together = bench.requests(stage)
        guiding, plain = (
            ServerConfig.parse("packcache", additional_config(name)["kv_cache_policy_config"])
            for name in ("guided", "plain")
        )
        streams = []
        for prompt, options in together:
            made = guiding.request(options, prompt)
            assert made is not None
            first, second = made.streams
            streams += [(prompt, first.plan), (second.ids(prompt, 0, second.own_tokens(len(prompt))), second.plan)]
            assert second.own_tokens(len(prompt) + geometry.max_tokens) <= geometry.max_model_len
        assert [prompt for prompt, _ in separate] == [list(ids) for ids, _ in streams]
        for (prompt, options), (_, plan_of_stream) in zip(separate, streams, strict=True):
            made = plain.request(options, prompt)
            assert made is None if stage == TEXTS else made is not None and made.streams[0].plan == plan_of_stream


def test_the_last_frame_is_that_of_the_paper() -> None:
    last = FULL.last_frame
    before = last.given_tokens - 12 * 4084
    assert last.tokens_per_frame == 4084
    assert before + last.steps + before == 4084, "around its middle"


def test_interpreted_kernels_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    now = iter([0.0, 1.0, 4.0, 9.0])
    monkeypatch.setattr(time, "process_time", lambda: next(now))
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda self: "done")
    monkeypatch.setattr(Engine, "__init__", lambda self, settings: None)
    monkeypatch.setattr("vllm_packcache.tools.interpreted.prepare", lambda: None)
    engine = InterpretedEngine(SimpleNamespace())  # type: ignore[arg-type]
    assert engine.processor_time() == 0
    assert interpreter.InterpretedFunction.run(None) == "done"
    assert engine.processor_time() == 9 - (4 - 1)


def test_goals_are_judged_by_the_median() -> None:
    result = results.guidance()
    assert [target["met"] for target in result["targets"]] == [True] * len(BOUNDS)
    for (stage, ratio), bound in BOUNDS.items():
        worse = json.loads(json.dumps(result))
        value = bound["at_most"] * 1.001 if "at_most" in bound else bound["at_least"] * 0.999
        worse["stages"][stage]["ratios"][ratio][CPU]["median"] = value
        met = {target["ratio"]: target["met"] for target in targets(worse)}
        assert [name for name, own in met.items() if not own] == [named(stage, ratio)]
    assert [target["met"] for target in targets(result | {"quick": True})] == [None] * len(BOUNDS)


def test_the_report_has_a_part_of_it(tmp_path: Path) -> None:
    result, files = results.guidance(), Files(tmp_path, tmp_path)
    text = "\n".join(map(str, GUIDANCE.report.long(result, files)))
    assert all(words in text for words in [*WORDS.values(), *NAMES.values()])
    assert "the last frame of 13 x 4,084 tokens" in text
    assert "guidance.json" in "\n".join(map(str, GUIDANCE.report.short(result, files)))
    assert [goal.name for goal in GUIDANCE.report.goals(result)] == list(WORDS.values())
    assert {row.place for row in GUIDANCE.report.rows(result)} == {"", TEXTS, VIDEOS, LAST}
