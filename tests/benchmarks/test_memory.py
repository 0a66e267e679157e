"""What policies let the model remember: what is asked, the films, and the whole run."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.memory import cached, runs
from benchmarks.memory.benchmark import CACHED, MEMORY, of_films
from benchmarks.memory.plan import CACHED_QUICK, FILMS, FULL, QUICK
from benchmarks.memory.runs import CHANGED, FILM_MEASURES, MEASURES, REMEMBERED, RETURNED, UNSEEN
from benchmarks.quality.variants import FULL_CACHE
from benchmarks.training.sparse_video import NOT_ASKED
from tests.benchmarks import results
from vllm_packcache.cli import app
from vllm_packcache.core.policies import PackCache
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED, true_frames
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, VideoTokenizer
from vllm_packcache.demo.world import make_film, make_world


def test_every_variant_has_a_name_and_the_papers_rule_is_among_them():
    for plan in (FULL, QUICK):
        for variants in (plan.variants, plan.film_variants):
            names = [variant.name for variant in variants]
            assert len(set(names)) == len(names)
            assert {FULL_CACHE, "packcache, H = 2", "changed, H = 2"} <= set(names)


def test_films_end_with_the_return_that_they_are_about():
    paper = next(variant for variant in FULL.variants if variant.family == "packcache").options["window"]
    away = {}
    for kind, cuts in FILMS.items():
        film, last = make_film(0, cuts), cuts[-1]
        assert film.returns(last)
        away[kind] = film.scene(last), next(n for n in range(1, last) if film.scene(last - n) == film.scene(last)) - 1
    assert away == {"returned_soon": (1, 5), "returned_late": (1, 13)}
    assert paper < 5 < PackCache.window < 13
    assert FILM_MEASURES.keys() == {*FILMS, *(kind + REMEMBERED for kind in FILMS)}


def test_asks_about_what_changed_came_out_and_returned(monkeypatch):
    """With a model that repeats the frame before, whatever the policy."""
    tokenizer = VideoTokenizer()

    def repeats(model, tokenizer, plan, block_size, ids, asked):
        frames = ids[:, CONDITION_TOKENS - 257 :].reshape(len(ids), -1, 257)[:, :-1, 1:]
        return np.where(asked, frames, NOT_ASKED)

    monkeypatch.setattr(runs, "likeliest", repeats)
    variants = FULL.film_variants[:2]
    seeds = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 2)
    for scores in runs._worlds(variants, 16, seeds):
        for number, seed in enumerate(seeds):
            world = make_world(seed)
            truth = true_frames(tokenizer, world, 16)
            assert scores[CHANGED][0][number].tolist() == [0] * 16
            assert scores[CHANGED][1][number].tolist() == (truth[1:] != truth[:-1]).sum((1, 2)).tolist()
            assert scores[RETURNED][1][number].tolist() == [world.emerging(k).sum() for k in range(1, 17)]
    for scores in runs._films(variants, seeds):
        for kind, cuts in FILMS.items():
            for key in (kind, kind + UNSEEN):
                right, of = scores[key]
                assert of.shape == (2, cuts[-1])
                assert right.sum() == 0
                assert of[:, :-1].sum() == 0
                assert ((of[:, -1] > 100) & (of[:, -1] < 256)).all()
            assert (scores[kind][1] == scores[kind + UNSEEN][1]).all()


def test_remembered_is_what_the_earlier_shot_adds(monkeypatch):
    """With a model that is right where the scene was seen before."""

    def remembers(model, tokenizer, plan, block_size, ids, asked):
        frames = ids[:, CONDITION_TOKENS:].reshape(len(ids), -1, 257)[..., 1:]
        # Frames of one scene differ by little more than its objects.
        known = (frames[:, :-1] == frames[:, -1:]).mean(2).max(1) > 0.8
        return np.where(asked & known[:, None, None], frames, NOT_ASKED)

    monkeypatch.setattr(runs, "likeliest", remembers)
    (scores,) = runs._films(FULL.film_variants[:1], range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 1))
    counts = {key: runs._count([own]) for key, own in scores.items()}
    assert {key: found.tolist() for key, found in of_films({"all": counts})["all"].items()} == {
        key: [1.0] for key in FILM_MEASURES
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("memory")
    return folder / "memory.json", folder / "memory.png"


@pytest.fixture(scope="module")
def measured(files: tuple[Path, Path]) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.memory.benchmark.processes", lambda: 1)
        MEMORY.run(*files, plan=QUICK, quick=True, console=console)
    return json.loads(files[0].read_text(encoding="utf-8")), console.file.getvalue()


def test_result_has_every_policy_and_measure(measured):
    result, _ = measured
    for part, variants, measures in (
        (result, QUICK.variants, MEASURES),
        (result["films"], QUICK.film_variants, FILM_MEASURES),
    ):
        names = [variant.name for variant in variants]
        assert list(part["variants"]) == names
        assert set(part["differences"]) == {
            f"{name} - packcache, H = 2" for name in names if "packcache, H" not in name
        }
        for own in part["variants"].values():
            assert own["scores"].keys() == measures.keys()
    # The model is good enough for right tokens to mean something; it knows no cuts.
    assert result["variants"][FULL_CACHE]["scores"][CHANGED]["mean"] > 0.8
    assert result["films"]["variants"][FULL_CACHE]["scores"]["returned_soon"]["mean"] < 0.9


def test_table_and_plot_show_every_policy(measured, files):
    _, printed = measured
    for variant in QUICK.variants:
        assert variant.name in printed
    for words in (*MEASURES.values(), *FILM_MEASURES.values()):
        assert words.split(",")[0] in printed
    with Image.open(files[1]) as picture:
        assert picture.format == "PNG"


def test_caches_of_fewer_bits_are_asked_the_same(tmp_path: Path):
    """Of two worlds, beside the same policy in bfloat16."""
    plan = replace(CACHED_QUICK, formats=("fp8_e5m2",))
    file, path = io.StringIO(), tmp_path / "memory_cached.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.memory.benchmark.processes", lambda: 1)
        result = CACHED.run(path, plan=plan, quick=True, console=Console(file=file, width=200))
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    bases = ("packcache, bfloat16", "changed, bfloat16", "changed, H = 1, bfloat16")
    assert [name for name in result["variants"] if name.endswith("bfloat16")] == list(bases)
    assert len(result["variants"]) == 9
    assert {pair.partition(" - ")[2] for pair in result["differences"]} == set(bases)
    # The model is good enough for right tokens to mean something.
    assert result["variants"]["changed, bfloat16"]["scores"][CHANGED]["mean"] > 0.8
    for name in (*result["variants"], *MEASURES.values()):
        assert name.split(",")[0] in file.getvalue()


def test_more_in_as_many_bytes_is_judged_beyond_the_interval():
    result = results.memory_cached()
    pair = "changed, int8_per_token_head, equal bytes - changed, bfloat16"
    for mean, met in ((0.021, True), (0.019, False), (-0.03, False)):
        result["differences"][pair][RETURNED] = {"mean": mean, "ci95": 0.02}
        (target,) = (own for own in cached.targets(result) if (own["pair"], own["measure"]) == (pair, RETURNED))
        assert target["met"] is met
    assert all("equal bytes" in own["pair"] for own in cached.targets(result))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--cache", "int4"], "--cache must be one of"),
        (["--cache", "fp8_e4m3", "--plot", "a.png"], "--plot draws a curve a policy, which --cache has none of"),
    ],
)
def test_formats_that_there_are_none_of_are_refused_first(arguments: list[str], sentence: str):
    called = CliRunner().invoke(app, ["bench", "memory", *arguments])
    assert called.exit_code == 2
    assert sentence in " ".join(called.output.split())
