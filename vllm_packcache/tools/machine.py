"""What a measurement was made on."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def about(benchmark: str, **machine: Any) -> dict[str, Any]:
    """What is needed to repeat a measurement, and what it is made on; to be called before it is made.

    Args:
        benchmark: its name.
        machine: what is used of the machine.
    """
    return {
        "benchmark": benchmark,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), **machine, "load_average_before": os.getloadavg()},
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what is measured."""
    names = {"torch": "torch", "vllm": "vllm", "vllm_packcache": "vllm-packcache"}
    return {"python": platform.python_version()} | {key: version(name) for key, name in names.items()}


def sha256(path: Path) -> str:
    """Of the weights that a measurement was made with, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cpu_model() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
