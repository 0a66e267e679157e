"""What a measurement was made on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what is measured."""
    names = {"torch": "torch", "vllm": "vllm", "vllm_packcache": "vllm-packcache"}
    return {"python": platform.python_version()} | {key: version(name) for key, name in names.items()}


def cpu_model() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
