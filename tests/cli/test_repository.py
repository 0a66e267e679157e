"""The Makefile and what no file of the repository may say."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = {
    ".venv",
    "demo",
    "demo-masked",
    "play",
    "playground",
    "test",
    "test-quick",
    "test-next",
    "test-long",
    "lint",
    "bench",
    "results",
    "clean",
    "help",
}

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Hosts of package registries, and folders of one machine. Written so that this file does not match itself.
FORBIDDEN = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|deb\.debian\.org|"
    r"(?<![\w.-])/wor[k]/|/roo[t]/(?!\.cache)|/opt/(?:pypi|wheels)/"
)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Not the flags of the make that may be running these tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@needs_make
def test_default_target_lists_all_targets() -> None:
    listed = make()
    assert listed.returncode == 0, listed.stderr
    assert set(re.findall(r"^  make (\S+)", listed.stdout, re.MULTILINE)) == TARGETS


@needs_make
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_targets_exist(target: str) -> None:
    assert make("-n", target).returncode == 0


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A stand-in for .venv whose ``vllm-packcache`` prints its arguments, one a line."""
    program = tmp_path / "bin" / "vllm-packcache"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    program.chmod(0o755)
    (tmp_path / ".installed").touch()
    return tmp_path


@needs_make
@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle moves right",
        'it\'s "so"; echo no',
        "$(shell echo no) costs $5 `echo no` $$HOME",
        "--help",
        "a, b=c #d",
    ],
)
@pytest.mark.parametrize("demo", ["demo", "demo-masked"])
def test_demo_passes_words_literally(installed: Path, prompt: str, demo: str) -> None:
    result = make(demo, f"VENV={installed}", f"PROMPT={prompt}", "IMAGE=my photos/it's me.jpg", "OUT=some where")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        demo, "--image", "my photos/it's me.jpg", "--prompt", prompt, "--out", "some where",
    ]  # fmt: skip


@needs_make
@pytest.mark.parametrize("demo", ["demo", "demo-masked"])
def test_demo_needs_no_words(installed: Path, demo: str) -> None:
    assert make(demo, f"VENV={installed}").stdout.splitlines() == [demo]


@needs_make
def test_the_playground_takes_arguments_of_the_command(installed: Path) -> None:
    assert make("playground", f"VENV={installed}").stdout.splitlines() == ["playground"]
    shown = make("playground", f"VENV={installed}", "PLAYGROUND=demo_masked --port 8000").stdout
    assert shown.splitlines() == ["playground", "demo_masked", "--port", "8000"]


@needs_make
def test_old_python_is_refused_with_a_sentence(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    result = make(".venv", f"VENV={tmp_path}/venv", f"PYTHON={python}")
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_continuous_integration_runs_make_test_only() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "make test"]


def test_no_registry_hosts_and_no_folders_of_one_machine() -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:
            text = content.decode("utf-8", errors="replace")
            found += [f"{name}: {match.group()}" for match in FORBIDDEN.finditer(text)]
    assert found == []
