"""What the wheel has: what a server needs, and neither tests nor benchmarks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
SIZE = 9_500_000
"""Bytes; nearly all of them are the weights of the bundled models."""


def sentence(folder: Path, path: Path) -> subprocess.CompletedProcess[str]:
    code = "from vllm_packcache.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code, "bench", "decode", "--quick"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_where_there_is_only_the_package_bench_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "site-packages"
    ignored = shutil.ignore_patterns("__pycache__", "model")
    shutil.copytree(ROOT / "vllm_packcache", path / "vllm_packcache", ignore=ignored)
    answer = sentence(tmp_path, path)
    assert answer.returncode == 2
    (line,) = answer.stderr.splitlines()
    assert "the benchmarks are not part of the installed package" in line


def test_the_wheel_has_the_package_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling is in the dev extra")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < SIZE
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site-packages")
    rooms = {name.partition("/")[0] for name in names}
    assert {room for room in rooms if not room.endswith(".dist-info")} == {"vllm_packcache"}
    assert not [name for name in names if {"benchmarks", "tests", "training", "examples"} & set(name.split("/"))]
    page = {f"vllm_packcache/sessions/page/{name}" for name in ("play.html", "play.css", "play.js", "icon.svg")}
    folder = ROOT / "vllm_packcache" / "videos" / "page"
    page |= {f"vllm_packcache/videos/page/{file.name}" for file in folder.iterdir()}
    assert {f"vllm_packcache/videos/page/playground.{kind}" for kind in ("html", "css", "js")} <= page
    assert {"vllm_packcache/py.typed", "vllm_packcache/configs/demo.yaml", *page} <= set(names)
    assert sentence(tmp_path, tmp_path / "site-packages").returncode == 2
