"""The sources of a vLLM that is not installed: single files out of its wheel, kept in pytest's cache."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.http import HTTPFile

from vllm_packcache.hooks.contract import files_of


def vllm_sources(cache: Path, version: str, modules: Iterable[str]) -> Path:
    """The folder of the ``vllm`` package of ``version`` with those of ``modules`` that it has.

    Of the wheel, some hundred megabytes, only the parts are read that hold
    what is not in the cache yet. Skips the test where the registry cannot be reached, or sends whole files only.
    """
    package = cache / version / "vllm"
    candidates = [files_of(module) for module in sorted(set(modules))]
    missing = [files for files in candidates if not any((package / file).is_file() for file in files)]
    if missing:
        with fsspec.open(_wheel_url(version), block_size=2**20, cache_type="blockcache").open() as remote:
            if not isinstance(remote, HTTPFile):
                pytest.skip(f"vllm {version} cannot be read in part: the package registry sends whole files only")
            with zipfile.ZipFile(remote) as wheel:
                there = set(wheel.namelist())
                wheel.extractall(
                    package.parent, [name for files in missing for file in files if (name := f"vllm/{file}") in there]
                )
    return package


def _wheel_url(version: str) -> str:
    # What pip would download, and does not: it names every file that it considers.
    command = (sys.executable, "-m", "pip", "index", "versions", "vllm", "-vv", "--no-color")
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    told = outcome.stdout + outcome.stderr
    # The wheel is for Linux on x86-64 and any Python 3; it is only read, so what runs here does not matter.
    found = re.search(rf"https?://\S+/vllm-{re.escape(version)}-cp\d+-abi3-manylinux\S+_x86_64\.whl", told)
    if found:
        return found[0]
    if _unreachable(told):
        pytest.skip(f"vllm {version} cannot be read: the package registry is out of reach")
    raise RuntimeError(f"pip index versions vllm names no wheel of {version}: {told.strip()[-2000:]}")


def _unreachable(told: str) -> bool:
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
    return any(mark in told for mark in marks)
