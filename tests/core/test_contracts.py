"""What imports what, and how a policy of another package is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import packages

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
        "import vllm_packcache.core.plan, vllm_packcache.core.policies, vllm_packcache.families.lumos\n"
        "vllm_packcache.core.policies.names()\n"
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

from vllm_packcache import Policy


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


def install(folder: Path, *entry_points: str, package: str = "other-policies") -> Path:
    entries = dict(entry.split(" = ") for entry in entry_points)
    modules = {"other_policies.py": POLICY_OF_ANOTHER_PACKAGE}
    return packages.install(folder, package, modules, {"vllm_packcache.policies": entries})


def test_a_policy_of_another_package_is_found_and_configured(tmp_path):
    result = python(
        "from vllm_packcache.core.policies import names\n"
        "from vllm_packcache.config.server import ServerConfig\n"
        "print(names())\n"
        "print(ServerConfig.parse('newest', {'blocks': 3}).policy)\n",
        path=install(tmp_path, "newest = other_policies:Newest"),
    )

    assert result.stdout.splitlines() == [
        "['attention_sink', 'full', 'newest', 'packcache', 'reset', 'sliding_window']",
        "Newest(blocks=3)",
    ], result.stderr


BROKEN = {
    "gone": (
        "gone = no_such_module:Gone",
        "policy 'gone' of package other-policies cannot be loaded (ModuleNotFoundError: No module named "
        "'no_such_module'): mend or uninstall the package, or choose another policy",
    ),
    "none": (
        "none = other_policies:NoPolicy",
        "policy 'none' of package other-policies must be a class that derives from vllm_packcache.Policy, "
        "and other_policies:NoPolicy is none: mend or uninstall the package, or choose another policy",
    ),
    "full": (
        "full = other_policies:Newest",
        "policy 'full' is offered by vllm-packcache and by package other-policies: uninstall all but one",
    ),
    "newest": (
        "newest = other_policies:Newest",
        "policy 'newest' is offered by package another and by package other-policies: uninstall all but one",
    ),
}
"""Entry points that cannot be used, and what who asks for them is told."""


def test_an_entry_point_that_cannot_be_used_is_in_nobodys_way(tmp_path):
    install(tmp_path, "newest = other_policies:NoPolicy", package="another")
    path = install(tmp_path, *(entry for entry, _ in BROKEN.values()))
    result = python(
        "import sys\n"
        "from vllm_packcache.core.policies import names\n"
        "from vllm_packcache.config.errors import ConfigError\n"
        "from vllm_packcache.config.server import ServerConfig\n"
        "print(names())\n"
        "print(ServerConfig.parse('packcache').policy.window)\n"
        "print('other_policies' in sys.modules)\n"
        f"for name in {list(BROKEN)}:\n"
        "    try:\n"
        "        ServerConfig.parse(name)\n"
        "    except ConfigError as error:\n"
        "        print(error)\n",
        path=path,
    )

    assert result.stdout.splitlines() == [
        "['attention_sink', 'full', 'gone', 'newest', 'none', 'packcache', 'reset', 'sliding_window']",
        "12",
        "False",
        *(f"kv_cache_policy: {sentence}" for _, sentence in BROKEN.values()),
    ], result.stderr


def test_doctor_names_what_cannot_be_used(tmp_path):
    result = python(
        "from vllm_packcache.tools.doctor import check_configuration\n"
        "for check in check_configuration():\n"
        "    print(check.verdict.value, check.name, check.found)\n",
        path=install(tmp_path, *(entry for name, (entry, _) in BROKEN.items() if name != "newest")),
    )

    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("fail")] == [
        f"fail policy {name} {BROKEN[name][1]}" for name in ("full", "gone", "none")
    ], result.stderr
    assert "ok policies attention_sink, packcache, reset, sliding_window" in lines
