"""What of vLLM's internals this package relies on, checked by reading vLLM's source.

Nothing is imported: the same check runs on the installed vLLM, in ``vllm-packcache doctor``, and on the unpacked
wheel of a version that is not installed. Every check fails with the name of what moved.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Reliance:
    """One thing of vLLM's that must be there.

    Args:
        name: what it is used for.
        file: the module's file, relative to the folder of the ``vllm`` package.
        symbol: a function, class, method (``Class.method``), field (``Class.field``) or imported name.
        parameters: parameters that the function must have, in any order.
        calls: names that its body must call or read, in this order.
    """

    name: str
    file: str
    symbol: str
    parameters: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class HookCheck:
    """The outcome for one `Reliance`: ``detail`` says where it is, or what moved."""

    name: str
    ok: bool
    detail: str


RELIANCES: tuple[Reliance, ...] = (
    Reliance("flag: add it to vllm serve", "engine/arg_utils.py", "EngineArgs.add_cli_args", ("parser",)),
    Reliance("flag: plugins load before the parser is built", "engine/arg_utils.py",
             "AsyncEngineArgs.add_cli_args", ("parser",), ("load_general_plugins", "add_cli_args")),
    Reliance("flag: carry it into additional_config", "engine/arg_utils.py", "EngineArgs.from_cli_args", ("args",)),
    Reliance("flag: field that carries it", "engine/arg_utils.py", "EngineArgs.additional_config"),
    Reliance("start-up: refuse what cannot be right", "engine/arg_utils.py", "EngineArgs.create_engine_config"),
    Reliance("start-up: configuration in every process", "config/vllm.py", "VllmConfig.additional_config"),
    Reliance("start-up: which runner", "config/vllm.py", "VllmConfig.use_v2_model_runner"),
    Reliance("request: refuse bad options with HTTP 400", "v1/engine/input_processor.py",
             "InputProcessor.process_inputs", ("request_id", "prompt", "params")),
    Reliance("request: the error that becomes HTTP 400", "exceptions.py", "VLLMValidationError", ()),
    Reliance("spec: base class", "v1/kv_cache_interface.py", "FullAttentionSpec.merge", ("specs",)),
    Reliance("spec: registry", "v1/kv_cache_spec_registry.py", "KVCacheSpecRegistry.register",
             ("kvcache_spec_cls", "manager_class", "uniform_type_base_spec")),
    Reliance("spec: built-in specs register first", "v1/kv_cache_spec_registry.py",
             "KVCacheSpecRegistry._ensure_registered", (), ("_REGISTRY_KVCACHESPEC_LIST",)),
    Reliance("spec: a backend may change it", "v1/attention/backend.py", "AttentionBackend.customize_spec", ("spec",)),
    Reliance("spec: the runner asks the backend", "v1/worker/utils.py", "customize_attention_spec",
             ("backend", "spec"), ("customize_spec",)),
    Reliance("manager: base class", "v1/core/single_type_kv_cache_manager.py", "SingleTypeKVCacheManager.__init__",
             ("kv_cache_spec", "block_pool", "enable_caching", "kv_cache_group_id"),
             ("req_to_blocks", "_null_block")),
    Reliance("manager: brings the request", "v1/core/single_type_kv_cache_manager.py",
             "FullAttentionManager.cache_blocks",
             ("request", "num_tokens", "retention_interval", "replay_boundaries")),
    Reliance("manager: frees blocks", "v1/core/single_type_kv_cache_manager.py",
             "SingleTypeKVCacheManager.remove_skipped_blocks",
             ("request_id", "processed_computed_tokens", "num_prompt_tokens")),
    Reliance("manager: a request ends", "v1/core/single_type_kv_cache_manager.py",
             "SingleTypeKVCacheManager.pop_blocks_for_free", ("request_id",)),
    Reliance("manager: freeing ends with pop_blocks_for_free", "v1/core/single_type_kv_cache_manager.py",
             "SingleTypeKVCacheManager.free", ("request_id",), ("pop_blocks_for_free",)),
    Reliance("manager: asked for managers that cache", "v1/core/kv_cache_coordinator.py",
             "KVCacheCoordinator.cache_blocks", ("request",), ("enable_caching", "cache_blocks")),
    Reliance("manager: frees before it allocates, caches after", "v1/core/kv_cache_manager.py",
             "KVCacheManager.allocate_slots", ("request",),
             ("remove_skipped_blocks", "num_in_flight_tokens", "allocate_new_blocks", "cache_blocks")),
    Reliance("prefix cache: a hit stops at the condition", "v1/core/kv_cache_manager.py",
             "KVCacheManager.get_computed_blocks", ("request",), ("find_longest_cache_hit",)),
    Reliance("prefix cache: shorten a hit", "v1/core/kv_cache_manager.py",
             "KVCacheManager.truncate_computed_blocks", ("blocks", "num_computed_tokens")),
    Reliance("pool: free in order", "v1/core/block_pool.py", "BlockPool.free_blocks", ("ordered_blocks",)),
    Reliance("attention: where the backend is chosen", "model_executor/layers/attention/attention.py",
             "get_attn_backend"),
    Reliance("attention: a layer asks for its backend", "model_executor/layers/attention/attention.py",
             "Attention.__init__", (), ("get_attn_backend", "get_impl_cls")),
    Reliance("attention: metadata builder", "v1/attention/backend.py", "AttentionMetadataBuilder.build",
             ("common_prefix_len", "common_attn_metadata", "fast_build")),
    Reliance("attention: builder class of a backend", "v1/attention/backend.py", "AttentionBackend.get_builder_cls"),
    Reliance("attention: graph support of a builder", "v1/attention/backend.py",
             "AttentionMetadataBuilder.get_cudagraph_support", ("vllm_config", "kv_cache_spec")),
    *(
        Reliance("attention: metadata field", "v1/attention/backend.py", f"CommonAttentionMetadata.{field}")
        for field in (
            "query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "num_reqs",
            "max_query_len", "max_seq_len", "block_table_tensor", "is_prefilling", "req_idx",
            "_num_computed_tokens_cache", "_token_to_req_indices_cache",
        )
    ),
    Reliance("V1 runner: attention metadata of a step", "v1/worker/gpu_model_runner.py",
             "GPUModelRunner._build_attention_metadata", ("num_scheduled_tokens",), ("build_metadata",)),
    Reliance("V1 runner: its requests", "v1/worker/gpu_model_runner.py", "GPUModelRunner.__init__", (),
             ("requests", "input_batch")),
    Reliance("V1 runner: a request", "v1/worker/gpu_input_batch.py", "CachedRequestState.sampling_params"),
    Reliance("V1 runner: a request's prompt length", "v1/worker/gpu_input_batch.py",
             "CachedRequestState.__post_init__", (), ("num_prompt_tokens",)),
    Reliance("V1 runner: computed tokens on the host", "v1/worker/gpu_input_batch.py", "InputBatch.__init__", (),
             ("num_computed_tokens_cpu",)),
    Reliance("V1 runner: block table on the host", "v1/worker/block_table.py", "BlockTable.get_numpy_array"),
)


def check_hooks(vllm_folder: Path | None = None) -> list[HookCheck]:
    """Check every `Reliance`.

    Args:
        vllm_folder: the folder of a ``vllm`` package; None: the installed one.
    """
    if vllm_folder is None:
        spec = find_spec("vllm")
        if spec is None or spec.origin is None:
            return [HookCheck("vllm", False, "vLLM is not installed")]
        vllm_folder = Path(spec.origin).parent
    return [_check(reliance, vllm_folder) for reliance in RELIANCES]


def _check(reliance: Reliance, folder: Path) -> HookCheck:
    where = f"vllm/{reliance.file}: {reliance.symbol}"
    file = folder / reliance.file
    if not file.is_file():
        return HookCheck(reliance.name, False, f"{where}: the file is gone")
    node = _find(_module(file), reliance.symbol.split("."))
    if node is None:
        return HookCheck(reliance.name, False, f"{where} is gone")
    if reliance.parameters:
        missing = set(reliance.parameters) - _parameters(node)
        if missing:
            return HookCheck(reliance.name, False, f"{where} no longer takes {', '.join(sorted(missing))}")
    names = list(_names_in_order(node))
    for called in reliance.calls:
        if called not in names:
            return HookCheck(reliance.name, False, f"{where} no longer uses {called}, or in another order")
        names = names[names.index(called) + 1 :]
    return HookCheck(reliance.name, True, where)


@cache
def _module(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _find(node: ast.AST, path: list[str]) -> ast.AST | None:
    for child in ast.iter_child_nodes(node):
        if path[0] in _defined_names(child):
            return child if len(path) == 1 else _find(child, path[1:])
    return None


def _defined_names(node: ast.AST) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.ImportFrom(names=names) | ast.Import(names=names):
            return {alias.asname or alias.name for alias in names}
    return set()


def _parameters(node: ast.AST) -> set[str]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    arguments = node.args
    return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def _names_in_order(node: ast.AST) -> Iterator[str]:
    """Names and attributes read or called in ``node``, in the order of the source."""
    found = [
        (child.end_lineno, child.end_col_offset, child.id if isinstance(child, ast.Name) else child.attr)
        for child in ast.walk(node)
        if isinstance(child, ast.Name | ast.Attribute)
    ]
    return (name for *_, name in sorted(found))
