"""All benchmarks into one folder: what is there is not measured again, what fails is said. The benchmarks are fakes."""

from __future__ import annotations

import csv
import inspect
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import everything
from benchmarks.calibrate.benchmark import CalibratePlan
from benchmarks.decode import plot as decode_plot
from benchmarks.engine_process import EngineFailed
from benchmarks.masked import plot as masked_plot
from benchmarks.protocol import Session
from benchmarks.quality import plot as quality_plot
from benchmarks.quality.runs import QualityPlan
from benchmarks.registry import benchmarks
from benchmarks.report.parts import read
from benchmarks.report.writer import CSV, REPORT
from benchmarks.serve import command as serve_command
from benchmarks.serve.plan import USUAL, ServePlan
from tests.benchmarks import results
from vllm_packcache import cli
from vllm_packcache.calibrate import report as calibrate_report
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.serving.server import ServerError
from vllm_packcache.tools import files
from vllm_packcache.tools.figures import QUICK

ALL = ["decode", "serve", "masked", "quality", "calibrate"]
JSON = [f"{name}.json" for name in ALL]
STRIPS = ["videos.png", "videos.svg"]
DRAWN = [
    *("decode.png", "decode.svg", "masked.png", "masked.svg", "frontier.png", "frontier.svg", "by_frame.png"),
    *("by_frame.svg", "quality.csv", "calibrate.png", "calibrate.svg"),
]


class Fakes:
    """Benchmarks that write what they should without measuring it.

    Attributes:
        measured: what has been measured, in order.
        drawn: files that have been drawn.
        failing: what a benchmark raises before it has written anything but empty files.
    """

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.drawn: list[str] = []
        self.failing: dict[str, BaseException] = {}

    def made(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        self.measured.append(name)
        if name in self.failing:
            raise self.failing[name]
        return result

    def decode(self, plan: Any, session: Session) -> dict[str, Any]:
        return self.made("decode", results.decode(quick=session.quick))

    def masked(self, plan: Any, session: Session) -> dict[str, Any]:
        return self.made("masked", results.read("masked.json") | {"quick": session.quick})

    def serve(self, plan: ServePlan, session: Session) -> dict[str, Any]:
        video = {name: getattr(plan, name) for name in ("condition_tokens", "tokens_per_frame", "frames")}
        own = {"video": video, "pool_blocks": plan.pool_blocks, "quick": session.quick}
        return self.made("serve", results.read("serve.json") | own)

    def quality(self, plan: QualityPlan, session: Session) -> dict[str, Any]:
        sizes = {"videos": plan.videos, "spans": list(plan.spans)}
        # Other spans than those of its scores would not go together.
        result = results.quality(3, plan.trained_frames)
        assert result["spans"] == sizes["spans"]
        result = self.made("quality", result | sizes)
        assert session.folder is not None
        for name in STRIPS:
            (session.folder / name).write_text("one world", encoding="utf-8")
        return result

    def calibrate(self, plan: CalibratePlan, session: Session) -> dict[str, Any]:
        result = self.made("calibrate", results.calibrate(2, plan.target) | {"videos": plan.videos})
        assert session.folder is not None
        (session.folder / "calibrated.yaml").write_text("history_frames: 2", encoding="utf-8")
        return result

    def draw(self, result: Any, path: Path) -> None:
        self.drawn.append(path.name)
        path.write_text(f"a {'quick' if result.get('quick') else 'full'} picture", encoding="utf-8")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes()
    own = [
        replace(
            benchmark,
            measure=getattr(fakes, benchmark.name),
            judged={},
            draw=benchmark.draw and fakes.draw,
            also=dict.fromkeys(benchmark.also, fakes.draw),
        )
        for benchmark in benchmarks()
        if benchmark.required
    ]
    monkeypatch.setattr(everything, "benchmarks", lambda: own)
    return fakes


@pytest.fixture
def run(fakes: Fakes, tmp_path: Path) -> Callable[..., tuple[list[str], str, dict[str, str]]]:
    """Run, and say what was measured, what was printed and what failed."""

    def run(**options: Any) -> tuple[list[str], str, dict[str, str]]:
        fakes.measured.clear()
        fakes.drawn.clear()
        console = Console(file=io.StringIO(), width=200)
        failed = everything.run(tmp_path, console=console, **options)
        assert isinstance(console.file, io.StringIO)
        return list(fakes.measured), console.file.getvalue(), failed

    return run


def test_everything_goes_into_one_folder(run, tmp_path: Path):
    measured, printed, failed = run()
    assert measured == ALL
    assert failed == {}
    assert {path.name for path in tmp_path.iterdir()} == {*JSON, *DRAWN, *STRIPS, "calibrated.yaml", CSV, REPORT}
    assert all(path.stat().st_size for path in tmp_path.iterdir())
    assert [line for line in printed.splitlines() if line.startswith("[")] == [
        f"[{number}/5] {name}" for number, name in enumerate(ALL, 1)
    ]
    assert "Missing" not in (tmp_path / REPORT).read_text(encoding="utf-8")
    with (tmp_path / CSV).open(encoding="utf-8") as file:
        assert {row["benchmark"] for row in csv.DictReader(file)} == {*ALL, "model"}


def test_what_is_complete_is_not_measured_again(run, fakes: Fakes, tmp_path: Path):
    run()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    measured, printed, failed = run()
    assert measured == []
    assert fakes.drawn == []
    assert failed == {}
    for name in ALL:
        assert f"{name}: complete in {name}.json, not measured again" in printed
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("text", ["", '{"benchmark": "serve", "load": {', "[]", '{"benchmark": "decode"}', "{}", "\0"])
def test_what_is_not_whole_is_measured_again(run, tmp_path: Path, text: str):
    run()
    (tmp_path / "serve.json").write_text(text, encoding="utf-8")
    assert run()[0] == ["serve"]
    assert read(tmp_path / "serve.json") is not None


def test_a_result_without_a_later_stage_is_measured_again(run, tmp_path: Path):
    run()
    files.write(tmp_path / "decode.json", results.decode(frames=False))
    assert run()[0] == ["decode"]


@pytest.mark.parametrize("name", DRAWN)
def test_a_lost_picture_is_drawn_from_the_result(run, fakes: Fakes, tmp_path: Path, name: str):
    run()
    (tmp_path / name).write_text("", encoding="utf-8")
    measured, *_ = run()
    assert measured == []
    assert name in fakes.drawn
    assert (tmp_path / name).stat().st_size


def test_pictures_of_videos_need_the_videos(run, tmp_path: Path):
    run()
    (tmp_path / "videos.svg").unlink()
    assert run()[0] == ["quality"]


def test_a_new_result_has_new_pictures(run, fakes: Fakes, tmp_path: Path):
    run()
    (tmp_path / "decode.json").unlink()
    run()
    assert fakes.drawn == ["decode.png", "decode.svg"]


def test_another_number_of_videos_is_another_quality_only(run, tmp_path: Path):
    run()
    assert run(videos=7)[0] == ["quality"]
    assert run(videos=7)[0] == []
    assert read(tmp_path / "quality.json")["videos"] == 7


def test_a_quick_run_says_so_and_its_results_are_not_those_of_a_full_one(run, tmp_path: Path):
    measured, *_ = run(quick=True)
    assert measured == ALL
    assert all(read(tmp_path / name)["quick"] for name in JSON)
    assert (tmp_path / REPORT).read_text(encoding="utf-8").count("**A quick run: ") == 5
    assert {(tmp_path / name).read_text(encoding="utf-8") for name in DRAWN} == {"a quick picture"}
    assert run(quick=True)[0] == []
    assert run()[0] == ALL
    assert not any(read(tmp_path / name).get("quick") for name in JSON)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    ("draw", "result"),
    [
        (decode_plot.draw, results.decode),
        (masked_plot.draw, lambda: results.read("masked.json")),
        (calibrate_report.draw, lambda: results.calibrate(2, 0.8)),
        (quality_plot.draw_frontier, lambda: results.quality(3, 2)),
        (quality_plot.draw_by_frame, lambda: results.quality(3, 2)),
    ],
    ids=["decode", "masked", "calibrate", "frontier", "quality"],
)
def test_every_plot_of_a_quick_run_says_so(draw, result, quick: bool, tmp_path: Path, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw(result() | {"quick": quick}, tmp_path / "x.png")
    assert figures
    assert all((QUICK in [text.get_text() for text in figure.texts]) == quick for figure in figures)


def test_a_quick_run_does_not_take_the_place_of_a_full_one(run, tmp_path: Path):
    run()
    (tmp_path / "decode.json").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"serve\.json is of a full run and would be lost: name another folder"):
        run(quick=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_quick_run_that_was_interrupted_before_it_said_so_goes_on(run, tmp_path: Path):
    run(quick=True)
    result = dict(read(tmp_path / "quality.json"))
    del result["quick"]
    files.write(tmp_path / "quality.json", result)
    (tmp_path / "videos.png").unlink()
    assert run(quick=True)[0] == ["quality"]
    assert read(tmp_path / "quality.json")["quick"]


@pytest.mark.parametrize(
    "error",
    [ServerError("the server died"), EngineFailed("an engine died"), ConfigError("--target is wrong"), KeyError("x")],
)
def test_one_that_fails_does_not_keep_the_others_from_running(run, fakes: Fakes, tmp_path: Path, error: Exception):
    fakes.failing["serve"] = error
    measured, printed, failed = run()
    assert measured == ALL
    assert failed == {"serve": str(error)}
    assert f"serve failed: {error}" in printed
    assert ("Traceback" in printed) == isinstance(error, KeyError)
    assert "**Missing: serve.**" in (tmp_path / REPORT).read_text(encoding="utf-8")
    fakes.failing.clear()
    assert run()[0] == ["serve"]
    assert "Missing" not in (tmp_path / REPORT).read_text(encoding="utf-8")


def test_one_that_fails_leaves_no_older_result(run, fakes: Fakes, tmp_path: Path):
    run(quick=True)
    fakes.failing["decode"] = EngineFailed("an engine died")
    run()
    assert read(tmp_path / "decode.json") is None
    assert not (tmp_path / "decode.png").exists()
    assert "**Missing: decode.**" in (tmp_path / REPORT).read_text(encoding="utf-8")


def test_an_interrupted_run_goes_on_where_it_was(run, fakes: Fakes, tmp_path: Path):
    fakes.failing["quality"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert fakes.measured == ["decode", "serve", "masked", "quality"]
    fakes.failing.clear()
    assert run()[0] == ["quality", "calibrate"]


def test_what_else_is_in_the_folder_stays(run, tmp_path: Path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "packcache-10000.npz").write_bytes(b"a part")
    (tmp_path / "notes.json").write_text("not JSON", encoding="utf-8")
    assert run()[0] == ALL
    assert (tmp_path / "parts" / "packcache-10000.npz").read_bytes() == b"a part"
    assert (tmp_path / "notes.json").read_text(encoding="utf-8") == "not JSON"


def test_the_command_fails_if_a_benchmark_does(fakes: Fakes, tmp_path: Path):
    fakes.failing = {"decode": EngineFailed("an engine died"), "calibrate": ConfigError("no")}
    answer = CliRunner().invoke(cli.app, ["bench", "all", "--out", str(tmp_path), "--videos", "3"])
    assert answer.exit_code == 1
    assert answer.stderr == "vllm-packcache: failed: decode, calibrate; the same command tries them again\n"
    fakes.failing.clear()
    answer = CliRunner().invoke(cli.app, ["bench", "all", "--out", str(tmp_path), "--videos", "3"])
    assert answer.exit_code == 0
    assert answer.stderr == ""


def test_a_folder_that_cannot_be_is_a_sentence(fakes: Fakes, tmp_path: Path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    answer = CliRunner().invoke(cli.app, ["bench", "all", "--out", str(tmp_path / "file")])
    assert answer.exit_code == 2
    assert len(answer.stderr.splitlines()) == 1
    assert fakes.measured == []


def test_sizes_are_those_of_the_commands():
    defaults = {name: own.default for name, own in inspect.signature(serve_command).parameters.items()}
    for name in ("frames", "tokens_per_frame", "condition_tokens", "pool_videos", "rounds"):
        assert getattr(USUAL, name) == defaults[name]
    assert inspect.signature(cli.calibrate).parameters["target"].default == CalibratePlan(videos=1).target


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_whole_command(tmp_path: Path):
    console = Console(file=io.StringIO(), width=100)
    assert everything.run(tmp_path, quick=True, console=console) == {}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*JSON, *DRAWN, *STRIPS, "calibrated.yaml", CSV, REPORT, "parts"}
    text = (tmp_path / REPORT).read_text(encoding="utf-8")
    assert "Missing" not in text
    assert "All frames one by one, end to end, and other policies: not measured" not in text
    assert text.count("**A quick run: ") == 5
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert everything.run(tmp_path, quick=True, console=console) == {}
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
