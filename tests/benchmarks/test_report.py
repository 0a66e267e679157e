"""The report says what the results say: all of it and nothing else; the committed one is of the committed JSON."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.decode.samples import CLOCKS
from benchmarks.quality import report as quality
from benchmarks.quality.benchmark import CAUSAL
from benchmarks.registry import benchmarks
from benchmarks.report import markdown
from benchmarks.report.writer import BEGIN, CSV, END, REPORT, report, texts
from tests.benchmarks import results
from vllm_packcache.cli import app
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.tools import files

README = results.ROOT / "docs" / "results" / "README.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of everything, and a README beside them."""
    folder = tmp_path_factory.mktemp("results")
    results.fill(folder)
    (folder / "README.md").write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def texts_of(folder: Path) -> dict[str, str]:
    return {path.name: text for path, text in texts(folder, folder / "README.md").items()}


def rows_of(text: str, benchmark: str) -> list[dict[str, str]]:
    return [row for row in csv.DictReader(io.StringIO(text)) if row["benchmark"] == benchmark]


def change(folder: Path, name: str, *path: Any, value: Any) -> None:
    result = json.loads((folder / name).read_text(encoding="utf-8"))
    *most, last = path
    place = result
    for key in most:
        place = place[key]
    assert place[last] != value
    place[last] = value
    files.write(folder / name, result)


# ---------------------------------------------------------------------------------------------------------------------
# What is committed


def test_readme_and_report_are_those_of_the_committed_results():
    for path, text in texts(results.COMMITTED, README).items():
        # Not asserted as such: the difference of two long texts takes minutes to print.
        same = path.read_text(encoding="utf-8") == text
        assert same, f"{path.relative_to(results.ROOT)} does not say what docs/results/*.json says: run make results"


def test_nothing_is_committed_that_can_be_made_again():
    assert "docs/results/parts/" in (results.ROOT / ".gitignore").read_text(encoding="utf-8").split()


# ---------------------------------------------------------------------------------------------------------------------
# Everything is there


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Numbers with their spread, lists of numbers, and all else, by its path."""
    if isinstance(value, dict) and not {"quartiles", "ci95"} & set(value):
        for key, own in value.items():
            yield from leaves(own, (*path, key))
    elif isinstance(value, list) and any(isinstance(own, dict | list) for own in value):
        for number, own in enumerate(value):
            yield from leaves(own, (*path, str(number)))
    else:
        yield path, value


SETTINGS = {"machine", "model", "policy", "policies", "plan", "video", "engine", "variants", "versions", "config"}
"""Of results: what was set, not what was measured."""


def measured(result: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield from leaves({key: own for key, own in result.items() if key not in SETTINGS})


def test_every_number_with_a_spread_is_in_the_csv(folder: Path):
    text = texts_of(folder)[CSV]
    for part in benchmarks():
        result = part.read(folder)
        assert result is not None
        rows = rows_of(text, part.name)
        found = {(row["value"], row["low"], row["high"]) for row in rows}
        values = {row["value"] for row in rows}
        spreads = 0
        for path, value in measured(dict(result)):
            if isinstance(value, dict) and "quartiles" in value:
                spreads += 1
                assert tuple(map(str, (value["median"], *value["quartiles"]))) in found, path
            elif isinstance(value, dict) and "ci95" in value:
                spreads += 1
                mean, error = value["mean"], value["ci95"]
                assert tuple(map(str, (mean, mean - error, mean + error))) in found, path
            elif path[-1] in ("by_frame", "mass") or path[:1] in (("mass_by_layer",), ("mass_by_head",)):
                assert {str(own) for own in value if own is not None} <= values, path
            elif set(path) & {*CLOCKS} and isinstance(value, list):
                assert any(float(own) == pytest.approx(median(value), rel=1e-12) for own in values if own), path
        assert spreads or part.name in ("serve", "calibrate", "calibrate-masked", "model", "gpu", "play", "bytes")


def test_every_sample_of_a_load_is_within_its_row(folder: Path):
    rows = {(row["name"], row["measure"]): row for row in rows_of(texts_of(folder)[CSV], "serve")}
    load = results.read("serve.json")["load"]
    for server in ("stock", "packcache"):
        own = [loads[server] for loads in load["rounds"]]
        for measure, samples in (
            ("throughput", [one["tokens_per_second"] for one in own]),
            ("preemptions", [one["preemptions"] for one in own]),
            ("most of the KV pool in use", [one["peak_usage"] for one in own]),
            ("whole video, p99", [one["video_seconds_percentiles"]["p99"] for one in own]),
            ("between two tokens, max", [one["inter_token_seconds"]["max"] for one in own]),
        ):
            row = rows[server, measure]
            assert (float(row["value"]), float(row["low"]), float(row["high"])) == (
                median(samples),
                min(samples),
                max(samples),
            )


def test_every_goal_is_in_the_csv_and_in_the_report(folder: Path):
    written = texts_of(folder)
    for part in benchmarks():
        result = part.read(folder)
        assert result is not None
        rows = rows_of(written[CSV], part.name)
        for target in result.get("targets", []):
            if "goal" in target:
                own = [row for row in rows if row["place"] == target["span"]]
                own = [row for row in own if row["name"] == target["goal"]]
                found = {row["measure"]: row["value"] for row in own}
                assert found[f"goal: {target['measure']}"] == str(target["mean"])
                assert found[f"goal met: {target['measure']}"] == str(int(target["met"]))
            else:
                own = [row for row in rows if row["name"] == target["ratio"]]
                assert str(target["value"]) in [row["value"] for row in own if row["measure"] == "goal"]
                bound = target.get("at_least", target.get("at_most"))
                assert str(bound) in [row["value"] for row in own if row["measure"] in ("goal >=", "goal <=")]
                met = "" if target["met"] is None else str(int(target["met"]))
                assert met in [row["value"] for row in own if row["measure"] == "goal met"]
        for goal in part.report.goals(result):
            line = f"| {part.name} | {' | '.join(goal)} |"
            assert line in written[REPORT]
            assert line in written["README.md"]


def test_losses_are_as_plain_as_wins(folder: Path):
    text = texts_of(folder)["README.md"]
    assert "| decode, ours: full / packcache | 2.50 | >= 4 | **MISSED** |" in text
    throughput = "| throughput by the engines' processor time, packcache / stock | 2.50 (rounds: 2.40 and 2.60) "
    assert f"{throughput}| >= 3 | **MISSED** |" in text
    goals = [goal for part in benchmarks() for goal in part.report.goals(part.read(folder) or {})]
    goals = [goal for goal in goals if goal.verdict != "not judged"]
    met = [goal for goal in goals if goal.verdict.startswith("met")]
    assert len(goals) > len(met) > 0
    assert f"{len(met)} of the {len(goals)} goals that were judged are met. " in text


def test_a_goal_of_quality_is_met_by_all_measures_or_says_which_miss_it(folder: Path):
    result = CAUSAL.read(folder)
    assert result is not None
    target = result["targets"][0]
    own = [t for t in result["targets"] if (t["goal"], t["span"]) == (target["goal"], target["span"])]
    for one in own:
        one["met"] = True
    assert quality.goals(result)[0].verdict == "met"
    own[1]["met"] = own[-1]["met"] = False
    goal = quality.goals(result)[0]
    assert goal.verdict == "**MISSED** by PSNR and after occlusion"
    assert goal.value.endswith(f"; {len(own) - 2} of {len(own)} measures")


def test_a_section_says_how_to_repeat_it(folder: Path):
    text = texts_of(folder)[REPORT]
    section = text[text.index("## Quality of the videos") : text.index("## Quality of videos made masked")]
    for words in (
        "- Command: `vllm-packcache bench all --out here`",
        "torch 2.13.0",
        "Some CPU",
        "0.2, 1.5, 2.8 before the run",
        "- Seeds: 10000 to 10002",
        "- Date: 2026-01-31",
        "- Took: 12 s",
    ):
        assert words in section


def test_tables_are_whole_and_pictures_are_there(folder: Path, copy: Path):
    for name in ("frontier", "decode", "masked"):
        (copy / f"{name}.png").write_bytes(b"a picture")
    (copy / "calibrate.png").touch()
    for name, text in texts_of(copy).items():
        if name != CSV:
            for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
                if is_table:
                    assert len({line.count("|") for line in lines}) == 1
            assert "](frontier.png)" in text
            assert "](decode.png)" in text
            assert "](masked.png)" in text
            assert "](calibrate.png)" not in text, "an empty file is no picture"
            assert "](long_video.png)" not in text
    assert "![" not in texts_of(folder)[REPORT]


# ---------------------------------------------------------------------------------------------------------------------
# Nothing else is there


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("decode.json", ("last_frame", "ratios", "full / packcache", "cpu_seconds", "median"), 9.876),
        ("decode.json", ("frames", "last", "ratios", "full / last frame", "cpu_seconds", "median"), 9.876),
        ("decode.json", ("frames", "end_to_end", "ratios", "full / attention sink", "cpu_seconds", "median"), 9.876),
        ("decode.json", ("targets", 0, "met"), False),
        ("masked.json", ("last_frame", "whole_frame", "ratios", "full / packcache", "cpu_seconds", "median"), 9.876),
        ("masked.json", ("last_frame", "floors", "whole_frame", "full / packcache"), 9.876),
        ("masked.json", ("memory", "kv_bytes", "packcache"), 987_600_000),
        ("serve.json", ("capacity", "packcache", "videos"), 15),
        ("serve.json", ("load", "rounds", 0, "stock", "tokens_per_second"), 400.0),
        ("quality.json", ("scores", "packcache", "tokens_right", "spans", "frames 5-8", "mean"), 0.9876),
        ("quality.json", ("scores", "a copy of the first picture", "ssim", "spans", "frames 1-2", "mean"), 0.9876),
        ("quality.json", ("targets", 0, "mean"), 0.9876),
        (
            "quality_guided.json",
            ("scores", "packcache, guidance 1.5", "tokens_right", "spans", "frames 1-2", "mean"),
            0.9876,
        ),
        (
            "quality_guided.json",
            ("differences", "changed, guidance 3 - changed", "identity", "frames 1-2"),
            {"mean": 0.9876, "ci95": 0.1},
        ),
        (
            "quality_cached.json",
            ("differences", "changed, fp8_e4m3 - changed, bfloat16", "identity", "frames 1-2"),
            {"mean": 0.9876, "ci95": 0.1},
        ),
        ("memory_cached.json", ("variants", "changed, bfloat16", "bytes"), 9876 * 1024),
        ("bytes.json", ("cases", "floats", "engines", "bfloat16", "at_once"), 9.87),
        ("quality_masked.json", ("scores", "packcache", "tokens_right", "spans", "frames 1-2", "mean"), 0.9876),
        ("quality_masked.json", ("model", "options", "steps"), 9),
        ("calibrate.json", ("fit", "rho"), 0.9876),
        ("calibrate.json", ("suggestion", "kept_measured"), 0.9876),
        ("calibrate_masked.json", ("fit", "rho"), 0.9876),
        (
            "long_video.json",
            ("generated", "packcache, rebase", "tokens_right", "spans", "145-160", "mean"),
            0.9876,
        ),
        ("gpu.json", ("targets", 0, "value"), 9.876),
    ],
)
def test_another_number_is_another_text(copy: Path, name: str, path: tuple[Any, ...], value: Any):
    before = texts_of(copy)
    change(copy, name, *path, value=value)
    after = texts_of(copy)
    assert after["README.md"] != before["README.md"]
    assert after[REPORT] != before[REPORT]


def test_the_same_results_are_the_same_text(copy: Path):
    before = texts_of(copy)
    for path in report(copy, copy / "README.md"):
        assert path.read_text(encoding="utf-8") == before[path.name]
    assert texts_of(copy) == before


def test_around_the_marks_nothing_changes(copy: Path):
    report(copy, copy / "README.md")
    text = (copy / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{BEGIN}\n\n")
    assert text.endswith(f"\n\n{END}\n\nafter\n")
    assert "old" not in text.splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# What is missing is said


def test_a_missing_benchmark_is_named(copy: Path):
    (copy / "quality.json").unlink()
    (copy / "calibrate.json").write_text("", encoding="utf-8")
    (copy / "serve.json").write_text('{"benchmark": "serve", "load"', encoding="utf-8")
    (copy / "decode.json").write_text('{"benchmark": "another"}', encoding="utf-8")
    (copy / "masked.json").write_text("[]", encoding="utf-8")
    (copy / "long_video.json").unlink()
    written = texts_of(copy)
    assert "**Missing: decode, serve, masked, quality, calibrate.**" in written[REPORT]
    for name in ("decode", "serve", "masked", "quality", "calibrate"):
        assert f"| {name} | every goal | not measured |  |  |" in written["README.md"]
        assert f"ot measured: `{name}.json` is not there, or not finished." in written["README.md"]
        assert not rows_of(written[CSV], name)
    assert "long" not in written["README.md"].lower().replace("the long form", "")


def test_a_missing_stage_is_named(copy: Path):
    files.write(copy / "decode.json", results.decode(frames=False))
    written = texts_of(copy)
    assert "| decode | full / packcache, end to end | not measured |  |  |" in written["README.md"]
    assert "All frames one by one, end to end, and other policies: not measured." in written["README.md"]
    assert "full / packcache, last frame" in written["README.md"]


def test_a_target_that_cannot_be_reached_is_missed(copy: Path):
    files.write(copy / "calibrate.json", results.calibrate(target=0.999))
    written = texts_of(copy)
    assert json.loads((copy / "calibrate.json").read_text(encoding="utf-8"))["suggestion"] is None
    assert "| calibrate | attention kept by any options | at most " in written["README.md"]
    assert "Nothing is suggested" in written[REPORT]


def test_without_a_gpu_the_report_says_why(copy: Path):
    files.write(copy / "gpu.json", results.read("gpu.json") | {"measured": False, "reason": "not measured: none here"})
    assert "**On a GPU** nothing has been measured: none here ([`gpu.json`](gpu.json))." in texts_of(copy)["README.md"]


def test_a_quick_run_is_not_judged(copy: Path):
    for name in ("decode.json", "serve.json", "masked.json", "quality.json", "calibrate.json"):
        result = json.loads((copy / name).read_text(encoding="utf-8"))
        files.write(copy / name, result | {"quick": True})
    written = texts_of(copy)
    assert written["README.md"].count("**A quick run: ") == 5
    text = written[REPORT]
    goals = text[: text.index("## Decoding")].splitlines()
    names = ("decode", "serve", "masked", "quality", "calibrate")
    lines = [line for line in goals if line.startswith(tuple(f"| {name} |" for name in names))]
    assert lines
    assert all(line.endswith("| not judged |") for line in lines)
    assert text.count("**A quick run: ") == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no marks", f"{BEGIN} once; it has it 0 times"),
        (f"{BEGIN}", f"{END} once; it has it 0 times"),
        (f"{BEGIN} {BEGIN} {END}", f"{BEGIN} once; it has it 2 times"),
        (f"{END} {BEGIN}", f"{END} after {BEGIN}"),
    ],
)
def test_a_readme_without_the_marks_is_refused(copy: Path, text: str, words: str):
    (copy / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="--readme"):
        report(copy, copy / "README.md")
    answer = CliRunner().invoke(app, ["bench", "report", str(copy), "--readme", str(copy / "README.md")])
    assert answer.exit_code == 2
    assert words in answer.stderr
    assert (copy / "README.md").read_text(encoding="utf-8") == text
    assert not (copy / CSV).exists()


def test_a_folder_without_results_is_refused(tmp_path: Path):
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    for folder in (tmp_path, tmp_path / "none"):
        answer = CliRunner().invoke(app, ["bench", "report", str(folder)])
        assert answer.exit_code == 2
        assert "has no results" in answer.stderr
        assert len(answer.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_the_command_says_what_it_wrote(copy: Path):
    answer = CliRunner().invoke(app, ["bench", "report", str(copy), "--readme", str(copy / "README.md")])
    assert answer.exit_code == 0
    assert answer.stdout.splitlines() == [f"wrote {copy / name}" for name in (CSV, REPORT, "README.md")]


# ---------------------------------------------------------------------------------------------------------------------
# Sentences and numbers


@pytest.mark.parametrize(
    ("means", "difference", "sentence"),
    [
        (
            {"packcache": 0.95, "packcache, rows": 0.94},
            ("packcache, rows", 0.01, 0.004),
            "`spatial` gets most tokens right at frames 1-2, 95.0 ± 1.0 %: 1.0 ± 0.4 points more than `rows`, the "
            "next, which is more than the confidence interval of the difference.",
        ),
        (
            {"packcache": 0.95, "packcache, tail": 0.96},
            ("packcache, tail", -0.01, 0.02),
            "`tail` gets most tokens right at frames 1-2, 96.0 ± 1.0 %: 1.0 ± 2.0 points more than `spatial`, the "
            "default, which is within the confidence interval of the difference.",
        ),
        (
            {"packcache": 0.95, "packcache, random": 0.97},
            ("packcache, random", -0.02, 0.01),
            "`random` gets most tokens right at frames 1-2, 97.0 ± 1.0 %: 2.0 ± 1.0 points more than `spatial`, the "
            "default, which is more than the confidence interval of the difference.",
        ),
    ],
)
def test_the_best_selection_is_named(means: dict[str, float], difference: tuple[str, float, float], sentence: str):
    result = results.quality()
    for name in quality.SELECTED.values():
        mean = means.get(name, 0.5)
        result["scores"][name]["tokens_right"]["spans"]["frames 1-2"] = {"mean": mean, "ci95": 0.01}
    other, mean, error = difference
    result["differences"][f"packcache - {other}"]["tokens_right"]["frames 1-2"] = {"mean": mean, "ci95": error}
    assert quality.selection_sentence(result, "frames 1-2") == f"Of the selections inside a frame {sentence}"


def test_what_guidance_does_is_said(copy: Path):
    result = results.quality_guided()
    changes = {"full cache": (0.02, 0.03), "packcache": (0.2, -0.1), "changed": (-0.3, -0.04)}
    for name, means in changes.items():
        result["scores"][name]["identity"]["spans"]["frames 1-2"] = {"mean": 0.5, "ci95": 0.02}
        for scale, mean in zip(("1.5", "3"), means, strict=True):
            own = result["differences"][f"{name}, guidance {scale} - {name}"]["identity"]
            own["frames 1-2"] = {"mean": mean, "ci95": 0.05}
    said = [
        "`full cache` gets 50.0 ± 2.0 % of objects right without guidance, no more and no fewer beyond the confidence "
        "interval with 1.5 and 3.",
        "`packcache` gets 50.0 ± 2.0 % of objects right without guidance, more with 1.5 (20.0 ± 5.0); fewer with 3 "
        "(10.0 ± 5.0).",
        "`changed` gets 50.0 ± 2.0 % of objects right without guidance, fewer with 1.5 (30.0 ± 5.0); no more and no "
        "fewer beyond the confidence interval with 3.",
    ]
    assert quality.guidance_sentence(result, "frames 1-2") == " ".join(said)
    files.write(copy / "quality_guided.json", result)
    (copy / "quality_guided.png").write_bytes(b"a picture")
    written = texts_of(copy)
    for text in (written[REPORT], written["README.md"]):
        flat = " ".join(text.split())
        assert " ".join(said) in flat
        assert "greedily, without guidance and with" in flat
        assert "![Quality by guidance](quality_guided.png)" in text
    section = written[REPORT].partition("## Quality of guided videos")[2].partition("\n## ")[0]
    assert "| changed | 1.5 |" in section
    assert "**-30.0 ± 5.0**" in section
    assert "**Goals**" not in section


@pytest.mark.parametrize(
    ("value", "text"),
    [(1074.3, "1,074"), (349.2, "349"), (53.218, "53.2"), (0.0078, "0.00780"), (0.000238, "0.000238"), (0, "0")],
)
def test_significant_digits(value: float, text: str):
    assert markdown.significant(value) == text


def test_quality_of_a_masked_model_has_what_it_has(copy: Path):
    for name in ("frontier", "by_frame", "quality_masked"):
        (copy / f"{name}.png").write_bytes(b"a picture")
    written = texts_of(copy)
    text = written[REPORT]
    section = text[text.index("## Quality of videos made masked") : text.index("## Calibration\n")]
    assert "3 + 1 passes a frame with guidance 1.5" in section
    assert "greedily" not in section
    assert "](quality_masked.png)" in section
    for words in ("frontier", "by_frame.png", "Selection inside"):
        assert words not in section
    assert "](quality_masked.png)" in written["README.md"]
    assert "[`quality_masked.json`](quality_masked.json)" in written["README.md"]


def test_passes_of_masked_generation_are_told_apart(copy: Path):
    name = "unconditional, half-way"
    change(copy, "calibrate_masked.json", "views", name, "mass", 0, value=0.12341)
    change(copy, "calibrate_masked.json", "views", name, "rho", value=0.6789)
    text = texts_of(copy)[REPORT]
    causal, section = text[text.index("## Calibration\n") : text.index("## Long videos")].split("## Calibration of ")
    (row,) = (line for line in section.splitlines() if line.startswith(f"| {name}"))
    assert row.startswith(f"| {name} | 12.34 |")
    assert row.endswith("| 0.679 |")
    assert "of the bundled masked model" in section
    assert "By pass" not in causal


def test_numbers():
    assert markdown.number(-0.04, 1) == "0.0"
    assert markdown.number(-1234.56, 1) == "-1,234.6"
    assert markdown.percent(0.9876) == "98.8 %"
    assert markdown.with_quartiles({"median": 3.816, "quartiles": [3.784, 3.895]}) == "3.82 (3.78 to 3.90)"
    assert markdown.with_quartiles({"median": 1.0326, "quartiles": [0.951, 1.1]}) == "1.033 (0.951 to 1.100)"
    assert markdown.ratio(9.42e-6) == "0.000009"
    assert markdown.ratio(0.001) == "0.001"
    assert [markdown.listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
