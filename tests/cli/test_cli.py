"""The command line as a whole."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_packcache.cli import app


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"vllm-packcache {version('vllm-packcache')}\n"


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "generate", "play", "explain", "doctor", "bench", "calibrate", "convert"):
        assert command in result.stdout
    benchmarks = CliRunner().invoke(app, ["bench", "--help"]).stdout
    for benchmark in ("decode", "masked", "serve", "quality", "long-video"):
        assert benchmark in benchmarks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "no-such-preset"], "neither a file nor a preset"),
        (["explain", "demo", "--policy", "no_such_policy"], "unknown policy"),
        (["explain", '{"layout": {"grid": [4, 4]}, "widow": 3}'], "widow"),
        (["explain", "{}"], "no layout"),
        (["play", "checkpoint"], "--config must be given with a checkpoint"),
        (["play", "--config", "mineworld_32f"], "'mineworld_32f' has nothing to play: give sessions: {pictures: "),
        (["play", "--config", '{"sessions": {"play": "a:b"}}'], "sessions.play needs pictures, which draws what is"),
        (["play", "--host", "192.0.2.1", "--port", "8000"], "--host 192.0.2.1 --port 8000 cannot be listened on"),
    ],
)
def test_mistakes_get_a_sentence_and_no_traceback(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("vllm-packcache: ")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = CliRunner().invoke(app, ["explain", "--out", str(tmp_path / "file" / "x.png")])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["explain", "--frames", "0"], ["explain", "--block-size", "x"], ["nonsense"]])
def test_usage_errors(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2
