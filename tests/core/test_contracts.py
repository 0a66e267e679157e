"""What imports what, and how a policy of another package is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str, *, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter with ``path`` on its path."""
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_import_contracts_hold():
    """The contracts are in pyproject.toml; one command checks them all."""
    pytest.importorskip("importlinter", reason="import-linter is in the dev extra")
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as main; main()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert result.returncode == 0, result.stdout + result.stderr


def test_the_core_loads_neither_vllm_nor_torch():
    result = python(
        "import json, sys\n"
        "import vllm_packcache.layout, vllm_packcache.masked, vllm_packcache.policies, vllm_packcache.positions\n"
        "import vllm_packcache.retention\n"
        "vllm_packcache.policies.available()\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )

    assert result.returncode == 0, result.stderr
    loaded = json.loads(result.stdout)
    assert "numpy" in loaded
    assert not {"vllm", "torch"} & set(loaded)


POLICY_OF_ANOTHER_PACKAGE = """
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_packcache.policies import Policy


@dataclass(frozen=True, kw_only=True)
class Newest(Policy):
    name: ClassVar[str] = "newest"
    blocks: int = 2

    def past_blocks(self, blocks, frame):
        end = blocks.tail_start(frame)
        return np.arange(max(0, end - self.blocks), end)


class NoPolicy:
    pass
"""


def install(folder: Path, entry_point: str) -> Path:
    """What an installed wheel leaves behind: a module and its metadata with one entry point."""
    (folder / "other_policies.py").write_text(POLICY_OF_ANOTHER_PACKAGE)
    metadata = folder / "other_policies-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-policies\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm_packcache.policies]\n{entry_point}\n")
    return folder


def test_a_policy_of_another_package_is_found_and_configured(tmp_path):
    result = python(
        "from vllm_packcache.policies import available\n"
        "from vllm_packcache.config import ServerConfig\n"
        "print(sorted(available()))\n"
        "print(ServerConfig.parse('newest', {'blocks': 3}).policy)\n",
        path=install(tmp_path, "newest = other_policies:Newest"),
    )

    assert result.stdout.splitlines() == [
        "['attention_sink', 'full', 'newest', 'packcache', 'sliding_window']",
        "Newest(blocks=3)",
    ], result.stderr


@pytest.mark.parametrize(
    ("entry_point", "error"),
    [
        (
            "none = other_policies:NoPolicy",
            "TypeError: entry point 'none' of group 'vllm_packcache.policies' is no",
        ),
        (
            "full = other_policies:Newest",
            "ValueError: entry point 'full' of group 'vllm_packcache.policies': the name is in use",
        ),
    ],
)
def test_an_entry_point_that_cannot_be_used_is_refused(tmp_path, entry_point, error):
    result = python("from vllm_packcache.policies import available; available()", path=install(tmp_path, entry_point))

    assert result.returncode != 0
    assert error in result.stderr
