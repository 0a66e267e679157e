"""What policies let the model remember: the likeliest tokens against the reference, the films, and the whole run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from benchmarks.memory import runs
from benchmarks.memory.benchmark import MEMORY, of_films
from benchmarks.memory.forced import NOT_ASKED, likeliest
from benchmarks.memory.plan import FILMS, FULL, LONG_WINDOW, QUICK, SHAPE
from benchmarks.memory.runs import CHANGED, FILM_MEASURES, MEASURES, REMEMBERED, RETURNED, UNSEEN
from benchmarks.quality.variants import BLOCK_SIZE, FULL_CACHE, Variant
from benchmarks.training.llama import Llama, load_pretrained
from vllm_packcache.demo.scores import FIRST_HELD_OUT_SEED, sequence, true_frames
from vllm_packcache.demo.tokenizer import CONDITION_TOKENS, MODEL_DIR, VideoTokenizer, world_prompt
from vllm_packcache.demo.world import make_film, make_world
from vllm_packcache.reference import LlamaReference

FRAMES = 5


def _variant(policy: str, **options: Any) -> Variant:
    return Variant(SHAPE, policy, policy, options)


PAPER = {"history_frames": 1.5, "window": 2}
VARIANTS = (
    _variant("full"),
    # Share the first frames, part, and turn the condition by as much as others and by less.
    _variant("packcache", **PAPER),
    _variant("packcache", **PAPER, positions="absolute"),
    _variant("packcache", **PAPER, selection="changed"),
    _variant("packcache", history_frames=1.5, window=3, selection="changed"),
    _variant("packcache", **PAPER, gamma_condition=0.3),
    # Of the first scene an anchor is left behind by the window.
    _variant("packcache", history_frames=2, window=2, selection="changed", episodes=1),
    _variant("sliding_window", window=1, positions="rebase"),
    _variant("attention_sink", sink_tokens=16, recent_tokens=300),
)


@pytest.fixture(scope="module")
def model() -> Llama:
    return load_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """A film, of which the model is sure of less than of a world."""
    tokenizer, film = VideoTokenizer(), make_film(FIRST_HELD_OUT_SEED, (2, 5))
    frames = sequence(tokenizer, true_frames(tokenizer, film, FRAMES)[1:])
    return np.concatenate([world_prompt(tokenizer, film), frames])


def _found(model: Llama, variants: tuple[Variant, ...], ids: np.ndarray, asked: np.ndarray) -> list[np.ndarray]:
    return likeliest(model, [variant.plan() for variant in variants], BLOCK_SIZE, ids, asked)


@pytest.fixture(scope="module")
def found(model, ids) -> list[np.ndarray]:
    return _found(model, VARIANTS, ids, np.ones((FRAMES, 256), bool))


def test_finds_what_the_reference_finds_likeliest(ids, found):
    reference = LlamaReference.load(MODEL_DIR)
    for variant, own in zip(VARIANTS, found, strict=True):
        logits = reference.logits(ids.tolist(), variant.plan(), BLOCK_SIZE)[CONDITION_TOKENS:].numpy()
        by_frame = logits.reshape(FRAMES, 257, -1)[:, :-1]
        chosen = np.take_along_axis(by_frame, own[..., None], -1)[..., 0]

        assert (by_frame.max(-1) - chosen).max() < 1e-4, variant.server
    different = {own.tobytes() for own in found}
    assert len(different) == len(VARIANTS), "or the test could not tell them apart"


def test_order_and_company_of_policies_change_nothing(model, ids, found):
    asked = np.ones((FRAMES, 256), bool)
    backwards = _found(model, VARIANTS[:0:-1], ids, asked)
    assert [own.tolist() for own in backwards[::-1]] == [own.tolist() for own in found[1:]]


def test_only_what_is_asked_for_is_answered(model, ids, found):
    asked = np.zeros((FRAMES, 256), bool)
    asked[1, 3] = asked[4, [0, 255]] = True
    for some, every in zip(_found(model, VARIANTS[:3], ids, asked), found, strict=False):
        assert (some == np.where(asked, every, NOT_ASKED)).all()


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
    assert paper < 5 < LONG_WINDOW < 13
    assert FILM_MEASURES.keys() == {*FILMS, *(kind + REMEMBERED for kind in FILMS)}


def test_asks_about_what_changed_came_out_and_returned(monkeypatch):
    """With a model that repeats the frame before, whatever the policy."""
    tokenizer = VideoTokenizer()

    def repeats(model, plans, block_size, ids, asked):
        frames = ids[CONDITION_TOKENS - 257 :].reshape(-1, 257)[:-1, 1:]
        return [np.where(asked, frames, NOT_ASKED) for _ in plans]

    monkeypatch.setattr(runs, "likeliest", repeats)
    variants = FULL.film_variants[:2]
    world = make_world(FIRST_HELD_OUT_SEED)
    truth = true_frames(tokenizer, world, 16)
    for scores in runs._world(variants, 16, FIRST_HELD_OUT_SEED):
        assert scores[CHANGED][0].tolist() == [0] * 16
        assert scores[CHANGED][1].tolist() == (truth[1:] != truth[:-1]).sum((1, 2)).tolist()
        assert scores[RETURNED][1].tolist() == [world.emerging(k).sum() for k in range(1, 17)]
    for scores in runs._films(variants, FIRST_HELD_OUT_SEED):
        for kind, cuts in FILMS.items():
            for key in (kind, kind + UNSEEN):
                right, of = scores[key]
                assert len(of) == cuts[-1]
                assert right.sum() == 0
                assert of[:-1].sum() == 0
                assert 100 < of[-1] < 256
            assert (scores[kind][1] == scores[kind + UNSEEN][1]).all()


def test_remembered_is_what_the_earlier_shot_adds(monkeypatch):
    """With a model that is right where the scene was seen before."""

    def remembers(model, plans, block_size, ids, asked):
        frames = ids[CONDITION_TOKENS:].reshape(-1, 257)[:, 1:]
        # Frames of one scene differ by little more than its objects.
        known = (frames[:-1] == frames[-1]).mean(1).max() > 0.8
        return [np.where(asked & known, frames, NOT_ASKED) for _ in plans]

    monkeypatch.setattr(runs, "likeliest", remembers)
    (scores,) = runs._films(FULL.film_variants[:1], FIRST_HELD_OUT_SEED)
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
