"""How good the bundled model is by itself, as `benchmarks.training.evaluate` measured when it was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.protocol import Benchmark, Report
from benchmarks.report.markdown import Files, number, percent
from benchmarks.report.parts import Goal, Result, Row
from benchmarks.report.table import Paragraph, Table
from vllm_packcache.demo.tokenizer import MODEL_DIR

EVALUATION = MODEL_DIR / "evaluation.json"

NAMES = {
    ("teacher_forced", "model"): "next frame, given the true ones",
    ("teacher_forced", "copy_last_frame"): "copying the last frame",
    ("generated", "model"): "whole video from the condition",
    ("generated", "copy_condition"): "copying the condition's picture",
}


def goals(result: Result) -> list[Goal]:
    """None: it is what the policies have to work with."""
    return []


def rows(result: Result) -> Iterator[Row]:
    """Every number of every length."""
    yield Row("model", "parameters", "", result["parameters"])
    for frames, own in result["lengths"].items():
        for (question, who), name in NAMES.items():
            for label, value in own[question][who].items():
                if not isinstance(value, list):
                    yield Row(name, label, f"{frames} frames", value)
                else:
                    for frame, one in enumerate(value, 1):
                        yield Row(name, label.removesuffix("_by_frame"), f"frame {frame} of {frames}", one)
        share = own["generated"]["frame_token_accuracy"]
        yield Row(NAMES["generated", "model"], "frame_token_accuracy", f"{frames} frames", share)


def _paragraphs(result: Result) -> Iterator[Paragraph]:
    for own in result["lengths"].values():
        yield (
            f"**The bundled model** ({result['parameters'] / 1e6:.1f} M parameters, a world of moving shapes) on "
            f"{own['videos']} held-out videos of {own['frames']} frames with the full cache, from "
            f"`vllm_packcache/demo/model/{EVALUATION.name}`:"
        )
        yield Table(
            ("", "tokens right", "changed tokens right", "PSNR, dB", "right objects", "right when back from occlusion"),
            [(name, *_cells(own[question][who])) for (question, who), name in NAMES.items()],
        )


def _cells(scores: Mapping[str, Any]) -> list[str]:
    shares = ("token_accuracy", "changed_token_accuracy", "objects_right", "returns_from_occlusion_right")
    first, second, *others = (percent(scores[label]) for label in shares)
    return [first, second, number(scores["psnr_db"], 1), *others]


def _text(result: Result, files: Files) -> Iterator[Paragraph]:
    return _paragraphs(result)


MODEL = Benchmark(
    name="model",
    title="The bundled model",
    place=10,
    report=Report(goals, rows, _text, _text),
    own_file=EVALUATION,
)
