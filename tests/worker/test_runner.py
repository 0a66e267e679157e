"""A model runner that the hooks do not reach is refused."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.v1.worker.cpu.model_runner import CPUModelRunner as CPUModelRunnerV2
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.runner import ON_V2
from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import POLICY_KEY
from vllm_packcache.hooks import install as hooks
from vllm_packcache.hooks.startup import check_model_runner
from vllm_packcache.worker.runner import RELIED_ON, V1, check_runner


class Calling(GPUModelRunner):
    def _preprocess(self, *args: Any, **kwargs: Any) -> Any:
        return super()._preprocess(*args, **kwargs)


class Derived(Calling):
    pass


class Replacing(Derived):
    """As Ascend's, which builds metadata of its own."""

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return super()._preprocess(*args, **kwargs)


class ReplacingV2(CPUModelRunnerV2):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        pass


def decorated(function: Any) -> Any:
    return wraps(function)(lambda *args: function(*args))


class Decorated(GPUModelRunner):
    @decorated
    def execute_model(self, output: Any) -> Any:
        return super().execute_model(output)


def test_every_hook_of_a_runner_is_relied_on() -> None:
    wrapped = {hook.symbol.partition(".")[2] for hook in hooks.ENGINE if hook.module == V1}
    assert wrapped <= set(RELIED_ON[V1])
    for module, names in RELIED_ON.items():
        assert all(hasattr(hooks.resolve_name(f"{module}:GPUModelRunner"), name) for name in names)


@pytest.mark.parametrize("kind", [GPUModelRunner, CPUModelRunner, CPUModelRunnerV2, Calling, Derived, Decorated])
def test_runners_that_carry_the_hooks(kind: type) -> None:
    check_runner(kind.__new__(kind))


@pytest.mark.parametrize(
    ("runner", "replaced"),
    [
        (Replacing.__new__(Replacing), "Replacing replaces _build_attention_metadata"),
        (ReplacingV2.__new__(ReplacingV2), "ReplacingV2 replaces load_model"),
        (object(), "builtins.object replaces vLLM's GPUModelRunner"),
    ],
)
def test_runners_that_do_not(runner: object, replaced: str) -> None:
    with pytest.raises(ConfigError, match=f"needs vLLM's own model runner, and .*{replaced}: start without a policy"):
        check_runner(runner)


@pytest.mark.parametrize(("additional", "refused"), [({POLICY_KEY: "packcache"}, True), ({}, False)])
def test_a_worker_looks_when_it_has_made_its_runner(additional: dict[str, Any], refused: bool) -> None:
    worker = SimpleNamespace(vllm_config=VllmConfig(additional_config=additional), worker=SimpleNamespace())

    def init_device(worker: Any) -> None:
        worker.worker.model_runner = Replacing.__new__(Replacing)

    if refused:
        with pytest.raises(ConfigError, match="Replacing replaces"):
            check_model_runner(init_device)(worker)
    else:
        check_model_runner(init_device)(worker)


def test_what_needs_v2_is_run_with_it():
    """A file that is skipped without it and not collected with it would never be run."""
    tests = Path(__file__).parents[1]
    needing = {
        file.relative_to(tests).as_posix()
        for file in tests.rglob("test_*.py")
        if "\npytestmark = needs_v2\n" in file.read_text(encoding="utf-8")
    }
    assert needing
    assert needing <= ON_V2
