"""What the package relies on in vLLM: in the installed version, in the next one, and as code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from packaging.version import Version
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import attention
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu import model_states
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState

from tests.hooks.wheels import vllm_sources
from tests.support import NEXT
from vllm_packcache.config.server import POLICY_KEY
from vllm_packcache.engine.manager import RetentionManager, cap_prefix_hits
from vllm_packcache.engine.spec import RetentionSpec
from vllm_packcache.hooks import contract
from vllm_packcache.hooks import install as hooks
from vllm_packcache.hooks import startup as plugin
from vllm_packcache.hooks.contract import check_hooks, places
from vllm_packcache.hooks.table import HOOKS as TABLE
from vllm_packcache.hooks.table import Hook, Place
from vllm_packcache.worker.attention import retaining_backend
from vllm_packcache.worker.runner_v1 import publish_step
from vllm_packcache.worker.runner_v2 import retaining_model_state


def each_place(version: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "place", places(version), ids=lambda place: f"{place.symbol.replace('.', '-')}: {place.why}"
    )


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    plugin.register()


# --------------------------------------------------------------------------- by reading source


@each_place(vllm.__version__)
def test_installed(place: Place) -> None:
    check = contract.check(place, Path(vllm.__file__).parent)
    assert check.ok, check.detail


@pytest.fixture(scope="module")
def next_vllm(request: pytest.FixtureRequest) -> Path:
    modules = {place.module for place in places(NEXT)}
    return vllm_sources(request.config.cache.mkdir("vllm-sources"), NEXT, modules)


@each_place(NEXT)
def test_next_version(place: Place, next_vllm: Path) -> None:
    check = contract.check(place, next_vllm)
    assert check.ok, f"vLLM {NEXT}: {check.detail}"


def test_both_versions_are_supported() -> None:
    supported = hooks.supported_vllm()
    assert supported.contains(NEXT)
    assert supported.contains(vllm.__version__.split("+")[0])
    assert hooks.version_error() is None


def test_check_hooks_checks_every_place() -> None:
    checks = check_hooks(vllm.__version__)
    assert [check.name for check in checks] == [place.why for place in places(vllm.__version__)]
    assert [check.detail for check in checks if not check.ok] == []


# --------------------------------------------------------------------------- the checker can fail

SOURCE = """
from elsewhere import tool

limit: int = 3
names = ("a",)


class Base:
    size: int

    def run(self, request, *, count=0):
        self.prepare(request)
        outcome = self.work(count)
        return self.finish(outcome)


async def serve(port, /):
    return port
"""

RUN = Place("run", "vllm.engine.core", "Base.run", ("request", "count"), reads=("prepare", "work", "finish"))


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], Path]:
    """``tree(source)`` -> the folder of a package whose engine/core.py holds ``source``."""

    def make(source: str) -> Path:
        # A folder of its own: the checker reads a file once.
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / "engine").mkdir(parents=True)
        (folder / "engine" / "core.py").write_text(source, encoding="utf-8")
        return folder

    return make


@pytest.mark.parametrize(
    "place",
    [
        RUN,
        replace(RUN, parameters=("self", "request", "count"), exact=True),
        *(Place("symbol", "vllm.engine.core", name) for name in ("tool", "limit", "names", "Base", "Base.size")),
        Place("coroutine", "vllm.engine.core", "serve", ("port",), exact=True),
    ],
    ids=lambda place: place.symbol,
)
def test_what_is_there_passes(tree: Callable[[str], Path], place: Place) -> None:
    check = contract.check(place, tree(SOURCE))
    assert check.ok
    assert check.detail == f"vllm/engine/core.py: {place.symbol}"


@pytest.mark.parametrize(
    ("change", "place", "moved"),
    [
        pytest.param(
            ("", ""),
            replace(RUN, module="vllm.engine.gone"),
            "engine/gone.py: Base.run: the file is gone",
            id="file",
        ),
        pytest.param(("def run", "def execute"), RUN, "Base.run is gone", id="method"),
        pytest.param(("class Base", "class Core"), RUN, "Base.run is gone", id="class"),
        pytest.param(("size: int", "extent: int"), replace(RUN, symbol="Base.size"), "Base.size is gone", id="field"),
        pytest.param(("import tool", "import drill"), replace(RUN, symbol="tool"), "tool is gone", id="import"),
        pytest.param(("count=0", "number=0"), RUN, "Base.run no longer takes count", id="parameter"),
        pytest.param(
            ("count=0", "count=0, limit=None"),
            replace(RUN, parameters=("self", "request", "count"), exact=True),
            "Base.run takes more than it did: limit",
            id="new parameter",
        ),
        pytest.param(
            ("self.work(count)", "count"), RUN, "Base.run no longer uses work, or in another order", id="call"
        ),
        pytest.param(
            (
                "self.prepare(request)\n        outcome = self.work(count)",
                "outcome = self.work(count)\n        self.prepare(request)",
            ),
            RUN,
            "Base.run no longer uses work, or in another order",
            id="order",
        ),
    ],
)
def test_what_moved_is_named(tree: Callable[[str], Path], change: tuple[str, str], place: Place, moved: str) -> None:
    assert change[0] in SOURCE
    check = contract.check(place, tree(SOURCE.replace(*change)))
    assert not check.ok
    assert check.detail.startswith("vllm/engine/")
    assert check.detail.endswith(moved)


def test_an_empty_folder_fails_every_check(tmp_path: Path) -> None:
    assert not any(check.ok for check in check_hooks(vllm.__version__, tmp_path))


def test_no_place_is_stated_twice() -> None:
    # A method of vLLM's may be overridden by several classes of ours.
    statements = [(place.module, place.symbol, hook.subclass) for hook in TABLE for place in hook.places()]
    assert len(set(statements)) == len(statements)


@pytest.mark.parametrize(
    ("override", "gone"),
    [
        ("manager:RetentionManager.evict", "RetentionManager has no evict"),
        ("manager:Gone.free", "has no class Gone"),
        ("gone:Gone.free", "there is no module vllm_packcache.engine.gone"),
    ],
)
def test_an_override_that_is_gone_is_named(tree: Callable[[str], Path], override: str, gone: str) -> None:
    """Otherwise nothing would be compared with vLLM's method."""
    with pytest.raises(LookupError, match=gone):
        contract.check(replace(RUN, override=f"vllm_packcache.engine.{override}"), tree(SOURCE))


def test_every_row_says_what_would_end_it() -> None:
    assert [hook.why for hook in TABLE if not hook.ended_by] == []


# --------------------------------------------------------------------------- what the plugin wraps


HOOKS = tuple(hook for hook in (*hooks.COMMAND_LINE, *hooks.ENGINE) if hook.true_of(Version(vllm.__version__)))
each_hook = pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.symbol)


def wrapped(hook: Hook) -> Any:
    """What is in the place of vLLM's function, as it stands there."""
    owner, name, _ = hooks._locate(hook)
    return vars(owner)[name]


def original(symbol: str) -> Any:
    """vLLM's own function behind the wrapper."""
    (hook,) = (hook for hook in HOOKS if hook.symbol == symbol)
    value = wrapped(hook)
    return vars(getattr(value, "__func__", value))[hooks.ORIGINAL]


def test_every_function_is_wrapped_once() -> None:
    """A second hook of the same function would not be installed."""
    places = [(hook.module, hook.symbol) for hook in HOOKS]
    assert len(set(places)) == len(places)


def test_all_hooks_are_installed() -> None:
    assert hooks.installed() == [f"{hook.module}.{hook.symbol}" for hook in HOOKS]
    assert hooks.fault() is None


def test_registering_again_changes_nothing() -> None:
    before = [wrapped(hook) for hook in HOOKS]
    plugin.register()
    plugin.register()
    assert [wrapped(hook) for hook in HOOKS] == before
    for hook in HOOKS:
        assert not hasattr(original(hook.symbol), hooks.ORIGINAL), f"{hook.symbol} is wrapped twice"


@each_hook
def test_a_wrapper_looks_like_what_it_wraps(hook: Hook) -> None:
    value = wrapped(hook)
    function = getattr(value, "__func__", value)
    assert inspect.signature(function) == inspect.signature(original(hook.symbol))
    assert function.__name__ == hook.symbol.rpartition(".")[2]
    if hook.symbol == "EngineArgs.add_cli_args":
        assert type(value) is staticmethod
    else:
        assert inspect.isfunction(value)


def accepts(function: Callable[..., Any], *args: str, **kwargs: str) -> None:
    """Fail unless ``function`` can be called so."""
    inspect.signature(function).bind(*args, **kwargs)


def test_the_originals_can_be_called_as_the_plugin_calls_them() -> None:
    accepts(original("EngineArgs.add_cli_args"), "parser")
    accepts(original("EngineArgs.create_engine_config"), "engine_args")
    accepts(original("InputProcessor.process_inputs"), "processor", "id", "prompt", "params", "tasks")
    accepts(original("OpenAIServingCompletion.create_completion"), "serving", "request", "raw request")
    accepts(original("OpenAIServingChat.create_chat_completion"), "serving", "request", "raw request")
    accepts(original("OpenAIServingChatBatch.create_batch_chat_completion"), "serving", "request", "raw request")
    accepts(original("OpenAIServingResponses.create_responses"), "serving", "request", "raw request")
    accepts(original("ServingTokens.serve_tokens"), "serving", "request", "raw request")
    accepts(original("KVCacheManager.get_computed_blocks"), "manager", "request")
    accepts(
        original("GPUModelRunner._build_attention_metadata"),
        "runner",
        num_tokens="",
        num_reqs="",
        max_query_len="",
        num_scheduled_tokens="",
    )
    accepts(original("GPUModelRunner._preprocess"), "runner", "scheduler_output", "num_input_tokens")
    accepts(original("GPUModelRunner.initialize_kv_cache"), "runner", "kv_cache_config")
    accepts(original("GPUModelRunner.sample_tokens"), "runner", "grammar_output")
    accepts(original("ModelConfig.get_and_verify_max_len"), "model_config", "max_model_len")
    accepts(original("Scheduler._reserve_prefill_lookahead"), "scheduler", "request", "computed", "new")
    accepts(KVCacheManager.truncate_computed_blocks, "manager", "blocks", "num_tokens")


@pytest.mark.parametrize(
    ("wrap", "args", "kwargs"),
    [
        # The next version gives get_computed_blocks an upper bound besides.
        pytest.param(cap_prefix_hits, ("request", 7), {}, id="cap_prefix_hits"),
        pytest.param(cap_prefix_hits, ("request",), {"max_cache_hit_length": 7}, id="cap_prefix_hits by name"),
        pytest.param(publish_step, (1, 2, 3), {"num_scheduled_tokens": None, "new": 1}, id="publish_step"),
    ],
)
def test_arguments_that_a_wrapper_does_not_know_reach_the_original(
    wrap: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    calls = []

    def function(owner: Any, *args: Any, **kwargs: Any) -> tuple[None, int, int]:
        calls.append((args, kwargs))
        return None, 0, 0

    owner = SimpleNamespace(
        coordinator=SimpleNamespace(single_type_managers=[None]),
        vllm_config=SimpleNamespace(additional_config={}, model_config=None),
    )
    wrap(function)(owner, *args, **kwargs)
    assert calls == [(args, kwargs)]


# --------------------------------------------------------------------------- what the package overrides


def overridden() -> Iterator[tuple[type, type, str]]:
    """(ours, vLLM's, name) of every method of vLLM's that a class of ours replaces."""
    backend = retaining_backend(CPUAttentionBackend, lambda spec: spec)
    classes: list[tuple[type, type]] = [
        (RetentionManager, FullAttentionManager),
        (RetentionSpec, FullAttentionSpec),
        (backend, AttentionBackend),
        (backend.get_builder_cls(), AttentionMetadataBuilder),
        (retaining_model_state(DefaultModelState), ModelState),
    ]
    for ours, base in classes:
        for name, value in vars(ours).items():
            function = getattr(value, "__func__", value)
            defined_here = getattr(function, "__module__", "").startswith("vllm_packcache")
            if inspect.isfunction(function) and defined_here and hasattr(base, name) and name[:2] != "__":
                yield ours, base, name


OVERRIDDEN = list(overridden())


def test_the_overrides_are_found() -> None:
    assert {name for *_, name in OVERRIDDEN} == {
        "add_request",
        "allocate_new_blocks",
        "build",
        "cache_blocks",
        "customize_spec",
        "get_builder_cls",
        "get_cudagraph_support",
        "get_num_blocks_to_allocate",
        "initialize_kv_cache",
        "max_memory_usage_bytes",
        "merge",
        "pop_blocks_for_free",
        "prepare_attn",
        "prepare_dummy_inputs",
        "prepare_inputs",
        "preprocess_state",
        "remove_request",
        "remove_skipped_blocks",
        "take_pending_cow_copies",
    }


@pytest.mark.parametrize(
    ("ours", "base", "name"), OVERRIDDEN, ids=[f"{ours.__name__}.{n}" for ours, _, n in OVERRIDDEN]
)
def test_an_override_takes_what_the_method_takes(ours: type, base: type, name: str) -> None:
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    shapes = []
    for owner in (ours, base):
        parameters = list(inspect.signature(getattr(owner, name)).parameters.values())
        shapes.append([(p.name, p.kind, p.default) for p in parameters if p.kind not in variadic])
    if any(p.kind is variadic[0] for p in inspect.signature(getattr(ours, name)).parameters.values()):
        # What it does not look at it passes on.
        shapes[1] = shapes[1][: len(shapes[0])]
    assert shapes[0] == shapes[1]
    stated = {
        place.symbol.rpartition(".")[2]
        for hook in TABLE
        if hook.subclass.endswith(f":{ours.__name__}")
        for place in hook.places()
        if place.override or place.exact
    }
    assert name in stated, "no row of the table names it"


def test_every_field_of_the_metadata_is_known() -> None:
    """A new field may be one value a request: compaction must follow it, or it describes the wrong rows."""
    replaced = {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_reqs",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "is_prefilling",
        "req_idx",
        "_num_computed_tokens_cache",
        "_token_to_req_indices_cache",
    }
    by_token = {
        "num_actual_tokens",
        "slot_mapping",
        "positions",
        "logits_indices_padded",
        "num_logits_indices",
    }
    # Of models and options that start-up refuses: a plain decoder has none of them.
    refused = {
        "causal",
        "max_logits_per_req",
        "encoder_seq_lens",
        "encoder_seq_lens_cpu",
        "dcp_local_seq_lens",
        "dcp_local_seq_lens_cpu_upper_bound",
        "mm_req_doc_ranges",
        "rswa_prefix_lens",
        "replayssm_decode_base_cpu",
    }
    assert {field.name for field in fields(CommonAttentionMetadata)} == replaced | by_token | refused


# --------------------------------------------------------------------------- the backend of a layer


def chosen_backend(config: VllmConfig) -> tuple[type, type]:
    """What vLLM chooses for a layer, and what the wrapper makes of it."""
    arguments = {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto"}
    with set_current_vllm_config(config):
        return original("get_attn_backend")(**arguments), attention.get_attn_backend(**arguments)


@pytest.mark.parametrize("additional_config", [{}, {"another_plugin": 1}, {POLICY_KEY: None}], ids=repr)
def test_switched_off_the_backend_is_vllms_own(additional_config: dict[str, Any]) -> None:
    stock, chosen = chosen_backend(VllmConfig(additional_config=additional_config))
    assert chosen is stock


def test_switched_on_the_layers_of_a_model_get_one_class() -> None:
    chosen = set()
    for _ in range(2):
        # Each layer reads the configuration anew.
        stock, backend = chosen_backend(VllmConfig(additional_config={POLICY_KEY: "packcache"}))
        assert backend is not stock
        assert issubclass(backend, stock)
        chosen.add(backend)
    assert len(chosen) == 1


# --------------------------------------------------------------------------- the state of a model


def chosen_state(config: VllmConfig, state: type) -> tuple[type, type]:
    """What vLLM chooses for a model that brings ``state``, and what the wrapper makes of it."""
    model = SimpleNamespace(get_model_state_cls=lambda: state)
    return (
        original("resolve_model_state_cls")(config, model),
        model_states.resolve_model_state_cls(config, model),
    )


def test_switched_off_the_model_state_is_the_models_own() -> None:
    assert chosen_state(VllmConfig(), DefaultModelState) == (DefaultModelState, DefaultModelState)


def test_switched_on_any_model_state_becomes_one_with_a_policy() -> None:
    class Own(DefaultModelState):
        supports_prompt_embeds = False

    config = VllmConfig(additional_config={POLICY_KEY: "packcache"})
    stock, chosen = chosen_state(config, Own)
    assert issubclass(chosen, stock)
    assert chosen is not stock
    assert chosen is chosen_state(config, Own)[1]
    assert chosen.supports_prompt_embeds is False
