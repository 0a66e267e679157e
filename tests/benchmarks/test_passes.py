"""Less computed in the passes of a frame: what is compared, what it costs, what is reckoned of a few passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.masked import passes
from benchmarks.masked.benchmark import PASSES as MASKED_PASSES
from benchmarks.masked.passes import Line, fitted, reckoned, rows_of
from benchmarks.protocol import Benchmark
from benchmarks.quality import deviation
from benchmarks.quality.benchmark import PASSES as QUALITY_PASSES
from benchmarks.quality.deviation import deviations
from benchmarks.quality.generators import Passes, cost, made_of
from benchmarks.quality.passes import less, plain
from tests.benchmarks import results
from vllm_packcache.cli import app
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.families.lumos import MaskedOptions

GRID, F, N = (16, 16), 276, 256
"""Of the bundled masked model: tokens of a frame, and visual ones."""


def test_a_cost_is_counted_in_rows_of_both_streams_and_in_forward_passes():
    eight = MaskedOptions(steps=8)
    assert cost(eight, GRID).rows == 9 * 2 * F
    assert cost(eight, GRID).forwards == 9
    # Before its passes floor(256 cos(pi k / 16)) are unknown; a settled row is one that was known a pass ago.
    unknown = [256, 251, 236, 212, 181, 142, 97, 49]
    settled = 2 * (F + sum(unknown[:7]) + F)
    assert cost(dataclasses.replace(eight, refresh=8), GRID).rows == settled
    # 5 and 20 of 256 are less than a tenth, 44 and more are not: two passes are drawn by what was there.
    assert cost(dataclasses.replace(eight, reuse=0.1), GRID) == (7 * 2 * F, 7)
    assert cost(dataclasses.replace(eight, guidance=1.0), GRID).rows == 9 * F


def test_each_is_compared_with_the_same_passes_and_with_whole_ones_of_no_more_rows():
    generator = Passes()
    pairs, by_name = list(generator.pairs), {own.name: own for own in generator.variants.named}
    assert {name for pair in pairs for name in pair} == set(by_name)
    assert len({*pairs}) == len(pairs)
    rows = {name: generator.about(own)["rows"] for name, own in by_name.items()}
    result = results.quality_passes()
    assert set(plain(result)) == {2, 3, 4, 5, 6, 7, 8, 12, 16}
    for name, (same, fewer) in less(result).items():
        assert (name, same) in pairs
        assert (name, fewer) in pairs
        assert rows[fewer] <= rows[name] < rows[same]
        assert not any(rows[fewer] < rows[other] <= rows[name] for other in plain(result).values())


def test_what_is_left_out_is_part_of_what_decides_a_video():
    generator = Passes()
    seed = 10_003
    made = {own.name: generator.request(own, 1, seed).options for own in generator.variants.named}
    assert len({dataclasses.astuple(own) for own in made.values()}) == len(made)
    assert made["8 passes, refresh 8"] == MaskedOptions(seed=seed, steps=8, guidance=1.5, remask=0.0, refresh=8)


def test_deviations_are_of_the_same_ids(monkeypatch):
    monkeypatch.setattr(deviation, "SETTINGS", ((1.5, 3), (15.0, 3)))
    monkeypatch.setattr(deviation, "WAYS", ({"refresh": 3}, {"guidance_interval": 3}))
    found = deviations(Passes(looked_at=(2, 1)))
    settled, unguided = ([own for own in found if own["name"] == name] for name in ("refresh 3", "guidance interval 3"))
    # Keys and values of this model are of a token alone.
    assert all(own["logits"]["mean"] == own["draws"]["mean"] == 0 for own in settled)
    little, much = (own["logits"]["mean"] for own in unguided)
    assert 0 < 2 * little < much, "guidance multiplies what one stream is off by"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--passes"], "--passes is for the masked model: give --masked too"),
        (["--masked", "--made", "steps=3"], "--made is for what passes compute: give --passes too"),
        (["--masked", "--passes", "--policy", "reset"], "passes are compared under one policy, the default"),
        (["--masked", "--passes", "--made", "steps"], "such as steps=8,refresh=4, not 'steps'"),
        (["--masked", "--passes", "--made", "seed=3"], "not 'seed=3'"),
        (["--masked", "--passes", "--made", "refresh=0"], "--made: refresh must be 1 or more"),
    ],
)
def test_passes_that_cannot_be_compared_are_refused_first(tmp_path, arguments, sentence):
    called = CliRunner().invoke(app, ["bench", "quality", "--out", str(tmp_path / "out"), *arguments])
    assert called.exit_code == 2
    assert sentence in " ".join(called.output.split())
    assert not (tmp_path / "out").exists()


def test_options_that_are_named_are_compared_besides(monkeypatch, tmp_path):
    plans: list[Any] = []
    monkeypatch.setattr(Benchmark, "run_in", lambda self, out, *, plan: plans.append((self, plan)))
    given = ["bench", "quality", "--masked", "--passes", "--out", str(tmp_path), "--made", "steps=10,refresh=4"]
    called = CliRunner().invoke(app, given)
    assert called.exit_code == 0, called.output
    ((benchmark, plan),) = plans
    assert benchmark is QUALITY_PASSES
    assert (plan.videos, plan.frames) == (50, 10)
    names = {own.name for own in plan.generator.variants.named}
    assert {"10 passes", "10 passes, refresh 4"} == names - {own.name for own in Passes().variants.named}
    with pytest.raises(ConfigError, match="must be options of requests"):
        made_of("steps=8,steps=9")


# ---------------------------------------------------------------------------------------------------------------------
# Times


def test_a_frame_is_reckoned_from_the_line_through_its_passes():
    line = fitted([(0, 1.0), (100, 3.0), (200, 5.0)])
    assert (line.start, line.slope) == pytest.approx((1.0, 0.02))
    assert line.off == pytest.approx(0, abs=1e-9)
    assert fitted([(0, 0.0), (1, 1.5), (2, 2.0)]).off == pytest.approx(0.5 / 3 / 2 * 2)
    # Two passes and the commit of 28 layers, of which one was timed.
    seconds = reckoned(Line(1.0, 0.5, 0.0), [10, 4, 20], 7.0, 0.25, 0.125, 28)
    assert seconds == pytest.approx(28 * (0.125 + 3 * 1.0 + 0.5 * 34) + 3 * 0.25 + 7.0)


def test_all_rows_of_the_published_frame_are_counted():
    plan = passes.sizes(quick=False)
    options, grid, frame = plan.reported("packcache"), plan.frame.grid, plan.frame.last_frame().tokens_per_frame
    assert rows_of(options, grid) == [2 * frame] * 51
    rows = rows_of(plan.reported("all of it"), grid)
    # Every eighth of the computed passes is whole, the first and the commit too; 14 are drawn by the ones before.
    assert (len(rows), rows[0], rows[-1]) == (37, 2 * frame, 2 * frame)
    assert 51 * 2 * frame / sum(rows) == pytest.approx(2.79, abs=0.01)
    timed = plan.rows(plan.cases["fewer rows"])
    assert len(timed) == passes.TIMED_STEPS + 1
    assert len(set(timed)) == passes.TIMED_STEPS, "all but the first and the commit have rows of their own"


def test_ratios_are_those_of_frames_that_take_what_their_rows_say():
    result = results.masked_passes()
    for line, slope in zip(result["lines"]["cpu_seconds"], (1e-3, 1.1e-3), strict=True):
        assert (line["start"], line["slope"]) == pytest.approx((0.25, slope))
    whole = result["whole_frame"]["cpu_seconds"]
    grid, sizes = (48, 84), passes.sizes(quick=False)
    unknown = sum(np.maximum(1, [np.floor(4032 * np.cos(np.pi * step / 100)) for step in range(50)]))
    for name in ("packcache", "all of it"):
        rows = rows_of(sizes.reported(name), grid)
        expected = 28 * (len(rows) * 0.25 + 1e-3 * sum(rows)) + len(rows) * 0.5 + 30 / 4032 * unknown
        assert whole[name][0] == pytest.approx(expected, rel=1e-3)
    goals = {target["ratio"]: target["at_least"] for target in result["targets"]}
    assert goals == {"packcache / settled rows": 1.35, "packcache / all of it": 2.0, "full / all of it": 5.0}
    assert all(isinstance(target["met"], bool) for target in result["targets"])
    quick = MASKED_PASSES.judged["targets"](result | {"quick": True})
    assert all(target["met"] is None for target in quick)
