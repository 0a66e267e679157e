"""The sources of a vLLM that is not installed: out of its wheel, kept in pytest's cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

_DONE = ".complete"


def vllm_sources(cache: Path, version: str) -> Path:
    """The folder of the ``vllm`` package of ``version``, with its Python files only.

    Downloaded once. Skips the test where the registry cannot be reached.
    """
    folder = cache / version
    if not (folder / _DONE).is_file():
        # Anew, should an earlier run have stopped half-way. The wheel is large, so it does not stay.
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache) as downloads:
            _unpack(_download(version, Path(downloads)), folder)
        (folder / _DONE).touch()
    return folder / "vllm"


def _download(version: str, folder: Path) -> Path:
    # The wheel is for Linux on x86-64 and any Python 3; it is only read, so what runs here does not matter.
    platform = ("--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:")
    command = (sys.executable, "-m", "pip", "download", f"vllm=={version}", "--no-deps", *platform)
    outcome = subprocess.run(
        [*command, "--dest", str(folder)], capture_output=True, text=True, check=False, timeout=540
    )
    wheels = sorted(folder.glob("*.whl"))
    if outcome.returncode == 0 and wheels:
        return wheels[0]
    if _unreachable(outcome.stderr):
        pytest.skip(f"vllm {version} cannot be downloaded, the package registry is out of reach")
    raise RuntimeError(f"pip download vllm=={version} failed: {outcome.stderr.strip()[-2000:]}")


def _unreachable(stderr: str) -> bool:
    """Whether pip says that it reached no registry; that the registry lacks a version is another matter."""
    marks = (
        "NewConnectionError",
        "Name or service not known",
        "Temporary failure in name resolution",
        "Connection refused",
        "Network is unreachable",
        "timed out",
        "ProxyError",
        "MaxRetryError",
    )
    return any(mark in stderr for mark in marks)


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
        archive.extractall(folder, names)
