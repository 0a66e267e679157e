"""What of vLLM's internals this package relies on, checked by reading vLLM's source.

Nothing is imported: the same check runs on the installed vLLM, in ``vllm-packcache doctor``, and on the
unpacked wheel of a version that is not installed. Every check fails with the name of what moved.
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
        exact: it must have no other parameters, because a function of ours with just these stands in for it.
    """

    name: str
    file: str
    symbol: str
    parameters: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    exact: bool = False


@dataclass(frozen=True)
class HookCheck:
    """The outcome for one `Reliance`: ``detail`` says where it is, or what moved."""

    name: str
    ok: bool
    detail: str


RELIANCES: tuple[Reliance, ...] = (
    Reliance("vLLM: its version", "__init__.py", "__version__"),
    Reliance("plugin: vLLM loads it", "plugins/__init__.py", "load_general_plugins"),
    Reliance(
        "plugin: loads in the engine core",
        "v1/engine/core.py",
        "EngineCore.__init__",
        (),
        ("load_general_plugins", "model_executor"),
    ),
    Reliance(
        "plugin: loads in the workers",
        "v1/worker/worker_base.py",
        "WorkerWrapperBase.init_worker",
        (),
        ("load_general_plugins",),
    ),
    Reliance(
        "plugin: a worker makes its model runner before the model loads",
        "v1/worker/worker_base.py",
        "WorkerWrapperBase.init_device",
        ("self",),
        ("worker", "init_device"),
        exact=True,
    ),
    *(
        Reliance("plugin: and keeps it", f"v1/worker/{file}.py", f"{worker}.init_device", (), (made_by,))
        for file, worker, made_by in (
            ("gpu_worker", "Worker", "_init_workspace_and_model_runner"),
            ("cpu_worker", "CPUWorker", "model_runner"),
        )
    ),
    Reliance(
        "plugin: and keeps it",
        "v1/worker/gpu_worker.py",
        "Worker._init_workspace_and_model_runner",
        (),
        ("model_runner",),
    ),
    *(
        Reliance("plugin: which platform", "platforms/interface.py", f"Platform.{name}")
        for name in ("device_name", "is_cpu", "is_cuda")
    ),
    Reliance("plugin: which process says that it is on", "engine/arg_utils.py", "EngineArgs._api_process_count"),
    Reliance("plugin: and which does not", "engine/arg_utils.py", "EngineArgs._api_process_rank"),
    Reliance(
        "flag: add it to vllm serve",
        "engine/arg_utils.py",
        "EngineArgs.add_cli_args",
        ("parser",),
        exact=True,
    ),
    Reliance(
        "flag: plugins load before the parser is built",
        "engine/arg_utils.py",
        "AsyncEngineArgs.add_cli_args",
        ("parser",),
        ("load_general_plugins", "add_cli_args"),
    ),
    Reliance(
        "flag: fields are copied from what was parsed",
        "engine/arg_utils.py",
        "EngineArgs.from_cli_args",
        ("cls", "args"),
        ("fields", "getattr", "hasattr"),
    ),
    Reliance("flag: field that carries it", "engine/arg_utils.py", "EngineArgs.additional_config"),
    Reliance(
        "start-up: refuse what cannot be right", "engine/arg_utils.py", "EngineArgs.create_engine_config", ("self",)
    ),
    Reliance("start-up: configuration in every process", "config/vllm.py", "VllmConfig.additional_config"),
    Reliance("start-up: configuration while a model is built", "config/__init__.py", "get_current_vllm_config"),
    Reliance("start-up: which runner", "config/vllm.py", "VllmConfig.use_v2_model_runner"),
    *(
        Reliance("start-up: what is refused", "config/vllm.py", f"VllmConfig.{field}")
        for field in (
            "model_config",
            "parallel_config",
            "cache_config",
            "speculative_config",
            "kv_transfer_config",
        )
    ),
    *(
        Reliance("start-up: models that are refused", "config/model.py", f"ModelConfig.{name}")
        for name in (
            "model",
            "hf_text_config",
            "use_mla",
            "is_hybrid",
            "is_attention_free",
            "has_inner_state",
            "is_encoder_decoder",
            "is_diffusion",
            "get_sliding_window",
            "rswa_window",
            "is_mm_prefix_lm",
            "uses_alibi",
            "using_transformers_backend",
        )
    ),
    Reliance(
        "start-up: models that are refused",
        "config/model.py",
        "ModelConfig.__post_init__",
        (),
        ("runner_type",),
    ),
    Reliance(
        "start-up: sequences longer than the model has positions",
        "config/model.py",
        "ModelConfig.get_and_verify_max_len",
        ("self", "max_model_len"),
        exact=True,
    ),
    *(
        Reliance("start-up: the attention backend that the operator names", "config/attention.py", name)
        for name in ("AttentionConfig.backend", "AttentionConfig.backend_per_kind")
    ),
    Reliance("start-up: positions with three axes", "config/model.py", "ModelConfig.uses_mrope"),
    Reliance("start-up: offloading", "config/cache.py", "CacheConfig.kv_offloading_size"),
    Reliance("start-up: quantised caches", "config/cache.py", "CacheConfig.cache_dtype"),
    *(
        Reliance("start-up: parallelism that is refused", "config/parallel.py", f"ParallelConfig.{name}")
        for name in (
            "decode_context_parallel_size",
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
            "use_ubatching",
        )
    ),
    Reliance("start-up: cache option that is refused", "config/cache.py", "CacheConfig.kv_sharing_fast_prefill"),
    *(
        Reliance(
            "request: as it came", f"entrypoints/{file}.py", symbol, ("self", "request", "raw_request"), exact=True
        )
        for file, symbol in (
            ("openai/completion/serving", "OpenAIServingCompletion.create_completion"),
            ("openai/chat_completion/serving", "OpenAIServingChat.create_chat_completion"),
            ("openai/chat_completion/batch_serving", "OpenAIServingChatBatch.create_batch_chat_completion"),
            ("openai/responses/serving", "OpenAIServingResponses.create_responses"),
            ("scale_out/token_in_token_out/serving", "ServingTokens.serve_tokens"),
        )
    ),
    *(
        Reliance("request: where its options are", f"entrypoints/{file}/protocol.py", f"{owner}.{field}")
        for file, owner, fields in (
            ("openai/completion", "CompletionRequest", ("vllm_xargs", "max_tokens", "use_beam_search")),
            (
                "openai/chat_completion",
                "ChatCompletionRequest",
                ("vllm_xargs", "max_tokens", "max_completion_tokens", "use_beam_search"),
            ),
            ("openai/responses", "ResponsesRequest", ("vllm_xargs", "max_output_tokens")),
            (
                "scale_out/token_in_token_out",
                "GenerateRequest",
                ("sampling_params", "is_sampling_param_provided"),
            ),
        )
        for field in fields
    ),
    Reliance(
        "request: where its options are",
        "entrypoints/generate/base/serving.py",
        "GenerateBaseServing.__init__",
        (),
        ("input_processor",),
    ),
    *(
        Reliance("request: what the operator gives", "config/model.py", f"ModelConfig.{field}")
        for field in ("override_generation_config", "logits_processors")
    ),
    Reliance(
        "request: refuse bad options with HTTP 400",
        "v1/engine/input_processor.py",
        "InputProcessor.process_inputs",
        ("request_id", "prompt", "params"),
    ),
    Reliance(
        "request: the configuration at hand",
        "v1/engine/input_processor.py",
        "InputProcessor.__init__",
        ("vllm_config",),
        ("vllm_config", "model_config"),
    ),
    *(
        Reliance("request: blocks that there are", "config/cache.py", f"CacheConfig.{field}")
        for field in ("num_gpu_blocks", "block_size")
    ),
    *(
        Reliance("request: engines whose blocks a front end adds up", "config/parallel.py", f"ParallelConfig.{field}")
        for field in (
            "data_parallel_size",
            "data_parallel_size_local",
            "data_parallel_rank_local",
            "local_engines_only",
        )
    ),
    Reliance(
        "request: where they are added up",
        "v1/engine/core_client.py",
        "MPClient._apply_ready_response",
        (),
        ("num_gpu_blocks", "num_gpu_blocks"),
    ),
    Reliance("request: the error that becomes HTTP 400", "exceptions.py", "VLLMValidationError", ()),
    *(
        Reliance("request: what arrives", "v1/engine/__init__.py", f"EngineCoreRequest.{field}")
        for field in ("prompt_token_ids", "prompt_embeds", "mm_features", "sampling_params", "resumable")
    ),
    Reliance("request: its options", "sampling_params.py", "SamplingParams.extra_args"),
    Reliance(
        "request: what the scheduler knows",
        "v1/request.py",
        "Request.__init__",
        (),
        ("request_id", "sampling_params", "num_prompt_tokens", "num_in_flight_tokens", "num_preemptions"),
    ),
    Reliance(
        "spec: base class",
        "v1/kv_cache_interface.py",
        "FullAttentionSpec.merge",
        ("cls", "specs"),
        exact=True,
    ),
    Reliance(
        "spec: bytes that the longest request takes",
        "v1/kv_cache_interface.py",
        "FullAttentionSpec.max_memory_usage_bytes",
        ("self", "vllm_config"),
        ("max_model_len", "page_size_bytes"),
        exact=True,
    ),
    Reliance("spec: steps in flight", "config/vllm.py", "VllmConfig.max_concurrent_batches"),
    Reliance("spec: what a backend is asked about", "v1/kv_cache_interface.py", "AttentionSpec"),
    Reliance("spec: its block size", "v1/kv_cache_interface.py", "KVCacheSpec.block_size"),
    Reliance("spec: groups of layers", "v1/kv_cache_interface.py", "KVCacheConfig.kv_cache_groups"),
    Reliance("spec: of a group", "v1/kv_cache_interface.py", "KVCacheGroupSpec.kv_cache_spec"),
    Reliance(
        "spec: registry",
        "v1/kv_cache_spec_registry.py",
        "KVCacheSpecRegistry.register",
        ("kvcache_spec_cls", "manager_class", "uniform_type_base_spec"),
    ),
    Reliance(
        "spec: built-in specs register first",
        "v1/kv_cache_spec_registry.py",
        "KVCacheSpecRegistry._ensure_registered",
        (),
        ("_REGISTRY_KVCACHESPEC_LIST",),
    ),
    Reliance(
        "spec: a backend may change it",
        "v1/attention/backend.py",
        "AttentionBackend.customize_spec",
        ("cls", "spec"),
        exact=True,
    ),
    Reliance(
        "spec: the runner asks the backend",
        "v1/worker/utils.py",
        "customize_attention_spec",
        ("backend", "spec"),
        ("customize_spec",),
    ),
    Reliance(
        "manager: base class",
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager.__init__",
        ("kv_cache_spec", "block_pool", "enable_caching", "kv_cache_group_id"),
        ("block_size", "block_pool", "enable_caching", "req_to_blocks", "_null_block"),
    ),
    Reliance(
        "manager: admission counts what a request holds",
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager.get_num_blocks_to_allocate",
        (
            "self",
            "request_id",
            "num_tokens",
            "new_computed_blocks",
            "total_computed_tokens",
            "num_local_computed_tokens",
            "num_tokens_main_model",
            "apply_admission_cap",
            "prefill_end",
        ),
        ("num_tokens", "req_to_blocks"),
        exact=True,
    ),
    Reliance(
        "manager: brings the request",
        "v1/core/single_type_kv_cache_manager.py",
        "FullAttentionManager.cache_blocks",
        ("self", "request", "num_tokens", "retention_interval", "replay_boundaries"),
        exact=True,
    ),
    Reliance(
        "manager: frees blocks",
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager.remove_skipped_blocks",
        ("self", "request_id", "processed_computed_tokens", "num_prompt_tokens"),
        exact=True,
    ),
    Reliance(
        "manager: a request ends",
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager.pop_blocks_for_free",
        ("self", "request_id"),
        exact=True,
    ),
    Reliance(
        "manager: freeing ends with pop_blocks_for_free",
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager.free",
        ("request_id",),
        ("pop_blocks_for_free",),
    ),
    Reliance(
        "manager: asked for managers that cache",
        "v1/core/kv_cache_coordinator.py",
        "KVCacheCoordinator.cache_blocks",
        ("request",),
        ("enable_caching", "cache_blocks"),
    ),
    Reliance(
        "manager: one for each group",
        "v1/core/kv_cache_coordinator.py",
        "KVCacheCoordinator.__init__",
        (),
        ("single_type_managers", "get_manager_for_kv_cache_spec"),
    ),
    Reliance(
        "manager: found from above",
        "v1/core/kv_cache_manager.py",
        "KVCacheManager.__init__",
        (),
        ("coordinator",),
    ),
    Reliance(
        "manager: frees before it allocates, caches after",
        "v1/core/kv_cache_manager.py",
        "KVCacheManager.allocate_slots",
        ("request",),
        ("remove_skipped_blocks", "num_in_flight_tokens", "allocate_new_blocks", "cache_blocks"),
    ),
    Reliance(
        "manager: steps count as in flight once scheduled",
        "v1/core/sched/scheduler.py",
        "Scheduler._update_after_schedule",
        (),
        ("num_computed_tokens", "num_in_flight_tokens"),
    ),
    Reliance(
        "manager: a preempted request starts anew",
        "v1/core/sched/scheduler.py",
        "Scheduler._preempt_request",
        (),
        ("_free_request_blocks", "num_computed_tokens"),
    ),
    Reliance(
        "scheduler: where a chunk ends",
        "v1/core/sched/scheduler.py",
        "Scheduler._reserve_prefill_lookahead",
        ("self", "request", "num_computed_tokens", "num_new_tokens"),
        exact=True,
    ),
    Reliance(
        "scheduler: asked for running and for waiting requests, after every other bound",
        "v1/core/sched/scheduler.py",
        "Scheduler.schedule",
        (),
        ("_reserve_prefill_lookahead", "allocate_slots", "_reserve_prefill_lookahead", "allocate_slots"),
    ),
    Reliance(
        "manager, scheduler: output is processed, and a request that cannot go on ends with an error",
        "v1/core/sched/scheduler.py",
        "Scheduler.update_from_output",
        (),
        (
            "num_in_flight_tokens",
            "_update_request_with_output",
            "grammar_compile_error_reqs",
            "finish_requests",
            "FINISHED_ERROR",
            "EngineCoreOutput",
        ),
    ),
    Reliance(
        "metrics: the scheduler's statistics",
        "v1/core/sched/scheduler.py",
        "Scheduler.make_stats",
        (),
        ("SchedulerStats",),
    ),
    Reliance("metrics: what travels with them", "v1/metrics/stats.py", "SchedulerStats.num_kv_fetch_reqs_by_stage"),
    Reliance(
        "metrics: who gets them, in order",
        "v1/metrics/loggers.py",
        "StatLoggerManager.__init__",
        ("vllm_config",),
        ("engine_indexes", "stat_loggers", "PrometheusStatLogger"),
    ),
    Reliance(
        "metrics: handed out in that order",
        "v1/metrics/loggers.py",
        "StatLoggerManager.record",
        ("scheduler_stats",),
        ("stat_loggers", "record"),
    ),
    Reliance("metrics: a logger", "v1/metrics/loggers.py", "AggregateStatLoggerBase"),
    Reliance(
        "metrics: bytes of a block",
        "v1/core/sched/scheduler.py",
        "Scheduler.__init__",
        ("kv_cache_config",),
        ("kv_cache_config", "kv_cache_groups"),
    ),
    *(
        Reliance("metrics: bytes of a block", "v1/kv_cache_interface.py", symbol)
        for symbol in (
            "AttentionSpec.page_size_bytes",
            "KVCacheGroupSpec.layer_names",
        )
    ),
    Reliance("metrics: why a request ended", "v1/request.py", "Request.get_finished_reason"),
    Reliance("metrics: reasons to end a request", "v1/engine/__init__.py", "FinishReason.__str__"),
    Reliance(
        "metrics: a request ends",
        "v1/core/sched/scheduler.py",
        "Scheduler._free_request",
        ("request",),
        ("_free_blocks",),
    ),
    Reliance(
        "prefix cache: the scheduler looks a prefix up",
        "v1/core/sched/scheduler.py",
        "Scheduler._get_local_prefix_cache_hit",
        ("request",),
        ("get_computed_blocks",),
    ),
    Reliance(
        "prefix cache: a hit stops at the condition",
        "v1/core/kv_cache_manager.py",
        "KVCacheManager.get_computed_blocks",
        ("request",),
        ("find_longest_cache_hit",),
    ),
    Reliance(
        "prefix cache: shorten a hit",
        "v1/core/kv_cache_manager.py",
        "KVCacheManager.truncate_computed_blocks",
        ("blocks", "num_computed_tokens"),
    ),
    Reliance(
        "pool: the null block",
        "v1/core/block_pool.py",
        "BlockPool.__init__",
        (),
        ("num_gpu_blocks", "null_block", "is_null"),
    ),
    Reliance("pool: free in order", "v1/core/block_pool.py", "BlockPool.free_blocks", ("ordered_blocks",)),
    Reliance(
        "attention: where the backend is chosen",
        "model_executor/layers/attention/attention.py",
        "get_attn_backend",
    ),
    Reliance(
        "attention: a layer asks for its backend",
        "model_executor/layers/attention/attention.py",
        "Attention.__init__",
        (),
        ("head_size", "attn_backend", "get_impl_cls", "kv_cache"),
    ),
    Reliance(
        "attention: backends are told apart by name",
        "v1/attention/backend.py",
        "AttentionBackend.full_cls_name",
        (),
        ("__qualname__",),
    ),
    Reliance(
        "attention: metadata builder",
        "v1/attention/backend.py",
        "AttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        exact=True,
    ),
    Reliance(
        "attention: a builder knows its spec",
        "v1/attention/backend.py",
        "AttentionMetadataBuilder.__init__",
        ("kv_cache_spec",),
        ("kv_cache_spec",),
    ),
    Reliance(
        "attention: builder class of a backend",
        "v1/attention/backend.py",
        "AttentionBackend.get_builder_cls",
        exact=True,
    ),
    Reliance(
        "attention: graph support of a builder",
        "v1/attention/backend.py",
        "AttentionMetadataBuilder.get_cudagraph_support",
        ("cls", "vllm_config", "kv_cache_spec"),
        exact=True,
    ),
    Reliance("attention: no graph", "v1/attention/backend.py", "AttentionCGSupport.NEVER"),
    Reliance(
        "attention: metadata is built anew each step",
        "v1/attention/backend.py",
        "AttentionMetadataBuilder.supports_update_block_table",
    ),
    *(
        Reliance("attention: metadata field", "v1/attention/backend.py", f"CommonAttentionMetadata.{field}")
        for field in (
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
        )
    ),
    Reliance(
        "attention: a builder's spec has the kernel's blocks",
        "v1/worker/utils.py",
        "AttentionGroup.create_metadata_builders",
        (),
        ("copy_with_new_block_size", "get_builder_cls"),
    ),
    Reliance(
        "attention: the manager's blocks are split where metadata is built",
        "v1/worker/utils.py",
        "AttentionGroup.build_metadata",
        ("common_attn_metadata",),
        ("build", "_with_kernel_block_table"),
    ),
    *(
        Reliance(
            "keys: side by side with the values",
            f"v1/attention/backends/{file}.py",
            f"{implementation}.do_kv_cache_update",
            ("kv_cache", "slot_mapping"),
            ("transpose", "split", "head_size"),
        )
        for file, implementation in (
            ("flash_attn", "FlashAttentionImpl"),
            ("triton_attn", "TritonAttentionImpl"),
            ("flashinfer", "FlashInferImpl"),
        )
    ),
    Reliance(
        "keys: packed in the first half of a block",
        "v1/attention/backends/cpu_attn.py",
        "CPUAttentionBackendImpl.do_kv_cache_update",
        ("layer", "kv_cache"),
        ("view", "chunk", "cpu_attn_reshape_and_cache", "isa"),
    ),
    Reliance(
        "keys: the kernel that packs them",
        "_custom_ops.py",
        "cpu_attn_reshape_and_cache",
        ("key", "value", "key_cache", "value_cache", "slot_mapping", "isa"),
    ),
    Reliance(
        "rotation: what all rotary embeddings have",
        "model_executor/layers/rotary_embedding/base.py",
        "RotaryEmbeddingBase.__init__",
        (),
        ("base", "is_neox_style"),
    ),
    Reliance(
        "rotation: frequencies",
        "model_executor/layers/rotary_embedding/base.py",
        "RotaryEmbeddingBase._compute_inv_freq",
        ("self", "base"),
        exact=True,
    ),
    *(
        Reliance(
            "rotation: frequencies",
            f"model_executor/layers/rotary_embedding/{file}.py",
            f"{embedding}.{method}",
            parameters,
            reads,
        )
        for file, embedding, method, parameters, reads in (
            ("llama3_rope", "Llama3RotaryEmbedding", "_compute_inv_freq", ("base",), ()),
            ("yarn_scaling_rope", "YaRNScalingRotaryEmbedding", "_compute_inv_freq", ("scaling_factor",), ()),
            ("linear_scaling_rope", "LinearScalingRotaryEmbedding", "__init__", (), ("scaling_factors",)),
            ("mrope", "MRotaryEmbedding", "_compute_inv_freq", ("base",), ("scaling_factor",)),
            ("mrope", "MRotaryEmbedding", "__init__", (), ("scaling_factor", "mrope_section", "mrope_interleaved")),
        )
    ),
    Reliance(
        "V1 runner: attention metadata of a step",
        "v1/worker/gpu_model_runner.py",
        "GPUModelRunner._build_attention_metadata",
        ("num_scheduled_tokens",),
        ("build_metadata",),
    ),
    Reliance(
        "V1 runner: slots are mapped, metadata is built for named requests, inputs are made, the model runs",
        "v1/worker/gpu_model_runner.py",
        "GPUModelRunner.execute_model",
        ("scheduler_output",),
        ("_prepare_inputs", "_build_attention_metadata", "num_scheduled_tokens", "_preprocess", "_model_forward"),
    ),
    Reliance(
        "V1 runner: slots are mapped from positions before, and which samples are thrown away is known",
        "v1/worker/gpu_model_runner.py",
        "GPUModelRunner._prepare_inputs",
        (),
        ("discard_request_mask", "positions", "compute_slot_mapping", "positions"),
    ),
    Reliance(
        "V1 runner: positions for the model",
        "v1/worker/gpu_model_runner.py",
        "GPUModelRunner._preprocess",
        ("scheduler_output",),
        ("mrope_positions", "positions"),
    ),
    Reliance(
        "V1 runner: tokens are sampled, and the generators of those that are thrown away turned back",
        "v1/worker/gpu_model_runner.py",
        "GPUModelRunner.sample_tokens",
        (),
        ("_sample", "_bookkeeping_sync"),
    ),
    Reliance(
        "V1 runner: which tokens are thrown away, and whose generators are turned back",
        "v1/worker/gpu_model_runner.py",
        "GPUModelRunner._bookkeeping_sync",
        (),
        ("num_reqs", "discard_request_mask", "generators"),
    ),
    Reliance(
        "V1 runner: the sampler draws from the batch's generators",
        "v1/worker/gpu_input_batch.py",
        "InputBatch._make_sampling_metadata",
        (),
        ("generators",),
    ),
    Reliance(
        "V1 runner: its layers",
        "config/compilation.py",
        "CompilationConfig.static_forward_context",
    ),
    Reliance(
        "V1 runner: its configuration and requests",
        "v1/worker/gpu_model_runner.py",
        "GPUModelRunner.__init__",
        (),
        ("vllm_config", "device", "requests", "input_batch"),
    ),
    Reliance(
        "V1 runner: its groups of layers",
        "v1/worker/gpu_model_runner.py",
        "GPUModelRunner.initialize_kv_cache",
        ("kv_cache_config",),
        ("kv_cache_config", "initialize_kv_cache_tensors"),
    ),
    Reliance(
        "V1 runner: that of a CPU derives from it",
        "v1/worker/cpu_model_runner.py",
        "CPUModelRunner",
        (),
        ("GPUModelRunner",),
    ),
    Reliance("V1 runner: a request", "v1/worker/gpu_input_batch.py", "CachedRequestState.sampling_params"),
    Reliance(
        "V1 runner: a request's prompt length",
        "v1/worker/gpu_input_batch.py",
        "CachedRequestState.__post_init__",
        (),
        ("num_prompt_tokens",),
    ),
    Reliance("V1 runner: the order of the batch", "v1/worker/gpu_input_batch.py", "InputBatch.req_ids"),
    Reliance(
        "V1 runner: computed tokens and block tables on the host",
        "v1/worker/gpu_input_batch.py",
        "InputBatch.__init__",
        (),
        ("num_computed_tokens_cpu", "block_table"),
    ),
    Reliance("V1 runner: block table of a group", "v1/worker/block_table.py", "MultiGroupBlockTable.__getitem__"),
    Reliance("V1 runner: block table on the host", "v1/worker/block_table.py", "BlockTable.get_numpy_array"),
    Reliance(
        "bench: vLLM's Triton attention, beside our own",
        "v1/attention/ops/triton_unified_attention.py",
        "unified_attention",
        ("q", "k", "v", "out", "cu_seqlens_q", "seqused_k", "softmax_scale", "causal", "block_table"),
    ),
    Reliance(
        "V2 runner: which model state a model has",
        "v1/worker/gpu/model_states/__init__.py",
        "resolve_model_state_cls",
        ("vllm_config", "model"),
    ),
    Reliance(
        "V2 runner: asked for when a model has been loaded",
        "v1/worker/gpu/model_states/__init__.py",
        "init_model_state",
        (),
        ("resolve_model_state_cls",),
    ),
    Reliance(
        "V2 runner: what a model state knows",
        "v1/worker/gpu/model_states/interface.py",
        "ModelState.__init__",
        ("vllm_config", "model", "device"),
        ("vllm_config", "model", "device", "max_num_tokens"),
    ),
    *(
        Reliance(
            f"V2 runner: {purpose}",
            "v1/worker/gpu/model_states/interface.py",
            f"ModelState.{method}",
            ("self", *parameters),
            exact=True,
        )
        for method, purpose, parameters in (
            ("add_request", "a request comes, or comes back", ("req_index", "new_req_data")),
            ("remove_request", "a request ends, or is preempted", ("req_id",)),
            ("initialize_kv_cache", "the cache is there", ("kv_cache_config", "block_tables")),
            (
                "preprocess_state",
                "before a step of requests",
                ("input_batch", "block_tables", "kv_cache_config", "num_computed_tokens"),
            ),
            (
                "prepare_attn",
                "attention metadata of a step",
                (
                    "input_batch",
                    "cudagraph_mode",
                    "block_tables",
                    "slot_mappings",
                    "attn_groups",
                    "kv_cache_config",
                    "for_capture",
                    "ubatch_idx",
                ),
            ),
            ("prepare_inputs", "positions for the model", ("input_batch", "req_states")),
            ("prepare_dummy_inputs", "positions that graphs read", ("num_reqs", "num_tokens")),
        )
    ),
    Reliance(
        "V2 runner: metadata is built inside",
        "v1/worker/gpu/model_states/default.py",
        "DefaultModelState.prepare_attn",
        ("input_batch",),
        ("build_attn_metadata", "seq_lens_cpu_upper_bound", "idx_mapping_np"),
    ),
    Reliance(
        "V2 runner: positions with three axes",
        "v1/worker/gpu/model_states/default.py",
        "DefaultModelState.prepare_inputs",
        (),
        ("rope_state", "prepare_positions", "get_positions"),
    ),
    Reliance(
        "V2 runner: builders build, for a step or for a capture",
        "v1/worker/gpu/attn_utils.py",
        "build_attn_metadata",
        (
            "attn_groups",
            "num_reqs",
            "num_tokens",
            "query_start_loc_gpu",
            "query_start_loc_cpu",
            "max_query_len",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "max_seq_len",
            "block_tables",
            "slot_mappings",
            "kv_cache_config",
            "causal",
            "for_cudagraph_capture",
        ),
        ("CommonAttentionMetadata", "build_metadata_for_cudagraph_capture", "build_metadata"),
    ),
    Reliance(
        "attention: a builder builds for a capture",
        "v1/attention/backend.py",
        "AttentionMetadataBuilder.build_for_cudagraph_capture",
        ("common_attn_metadata",),
        ("build",),
    ),
    Reliance(
        "attention: a builder knows its server",
        "config/scheduler.py",
        "SchedulerConfig.max_num_seqs",
    ),
    Reliance(
        "V2 runner: requests end and come, slots are mapped, metadata is built, inputs are made, the model runs",
        "v1/worker/gpu/model_runner.py",
        "GPUModelRunner.execute_model",
        ("scheduler_output", "dummy_run"),
        (
            "finish_requests",
            "add_requests",
            "update_requests",
            "prepare_inputs",
            "prepare_attn",
            "preprocess_state",
            "prepare_attn",
            "prepare_inputs",
            "run_fullgraph",
        ),
    ),
    Reliance(
        "V2 runner: a request that comes",
        "v1/worker/gpu/model_runner.py",
        "GPUModelRunner.add_requests",
        (),
        ("_remove_request", "add_request"),
    ),
    Reliance(
        "V2 runner: preempted requests are removed",
        "v1/worker/gpu/model_runner.py",
        "GPUModelRunner.finish_requests",
        (),
        ("preempted_req_ids", "_remove_request"),
    ),
    Reliance(
        "V2 runner: slots are mapped by index",
        "v1/worker/gpu/model_runner.py",
        "GPUModelRunner.prepare_attn",
        (),
        ("gather_block_tables", "compute_slot_mappings", "positions"),
    ),
    Reliance(
        "V2 runner: builders are made, the cache is bound, the model state is told",
        "v1/worker/gpu/model_runner.py",
        "GPUModelRunner.initialize_kv_cache",
        ("kv_cache_config",),
        ("init_attn_backend", "BlockTables", "init_kv_cache", "model_state", "initialize_kv_cache"),
    ),
    Reliance(
        "V2 runner: what is captured",
        "v1/worker/gpu/cudagraph_utils.py",
        "prepare_inputs_to_capture",
        ("model_state", "full_cudagraph"),
        ("make_dummy", "prepare_attn"),
    ),
    *(
        Reliance("V2 runner: a batch", "v1/worker/gpu/input_batch.py", f"InputBatch.{field}")
        for field in (
            "req_ids",
            "idx_mapping",
            "idx_mapping_np",
            "num_scheduled_tokens",
            "num_computed_tokens_np",
            "positions",
            "num_reqs",
            "num_tokens",
            "query_start_loc",
            "query_start_loc_np",
            "seq_lens",
            "input_ids",
            "num_draft_tokens_per_req",
            "logits_indices",
        )
    ),
    Reliance(
        "V2 runner: block tables of a group",
        "v1/worker/gpu/block_table.py",
        "BlockTables.__init__",
        (),
        ("block_tables", "StagedWriteTensor"),
    ),
    Reliance(
        "V2 runner: rows on the device that the host writes",
        "v1/worker/gpu/buffer_utils.py",
        "StagedWriteTensor.__init__",
        ("size", "dtype", "device"),
        ("gpu",),
    ),
    Reliance(
        "masked: a model of ours",
        "model_executor/models/registry.py",
        "_ModelRegistry.register_model",
        ("self", "model_arch", "model_cls"),
    ),
    Reliance(
        "masked: what a model sets in its server's configuration",
        "model_executor/models/config.py",
        "VerifyAndUpdateConfig.verify_and_update_config",
        ("vllm_config",),
    ),
    Reliance(
        "masked: found by the model's name",
        "config/vllm.py",
        "VllmConfig.try_verify_and_update_config",
        (),
        ("MODELS_CONFIG_MAP", "architecture", "verify_and_update_config"),
    ),
    Reliance(
        "masked: set before graphs are chosen, schedulers after; graphs are off where a model is run eagerly",
        "config/vllm.py",
        "VllmConfig.__post_init__",
        (),
        (
            "try_verify_and_update_config",
            "enforce_eager",
            "check_and_update_config",
            "scheduler_cls",
            "async_scheduling",
        ),
    ),
    Reliance("masked: a frame is a canvas", "config/diffusion.py", "DiffusionConfig.canvas_length"),
    Reliance(
        "masked: and speculative tokens",
        "config/vllm.py",
        "VllmConfig.num_speculative_tokens",
        (),
        ("diffusion_config", "canvas_length"),
    ),
    *(
        Reliance("masked: room for a frame in a step", "config/scheduler.py", f"SchedulerConfig.{field}")
        for field in (
            "max_num_batched_tokens",
            "max_num_scheduled_tokens",
            "long_prefill_token_threshold",
            "scheduler_cls",
        )
    ),
    Reliance("masked: recommended sampling is for decoders", "config/model.py", "ModelConfig.generation_config"),
    Reliance("masked: no graphs", "config/model.py", "ModelConfig.enforce_eager"),
    Reliance("masked: no prefix caching", "config/cache.py", "CacheConfig.enable_prefix_caching"),
    *(
        Reliance(
            "masked: schedulers of canvases",
            "v1/core/sched/diffusion_scheduler.py",
            name,
        )
        for name in ("DiffusionScheduler", "DiffusionAsyncScheduler")
    ),
    Reliance(
        "masked: a request's canvas",
        "v1/core/sched/diffusion_scheduler.py",
        "diffusion_canvas_width",
        ("request", "canvas_length"),
        ("extra_args", "get"),
    ),
    Reliance(
        "masked: blocks of a stream",
        "v1/core/single_type_kv_cache_manager.py",
        "SingleTypeKVCacheManager.allocate_new_blocks",
        ("self", "request_id", "num_tokens", "num_tokens_main_model"),
        exact=True,
    ),
    Reliance(
        "masked: specs with bases of their own are groups of their own",
        "v1/kv_cache_spec_registry.py",
        "KVCacheSpecRegistry.get_uniform_type_base_spec",
        ("kvcache_spec",),
        ("uniform_type_base_spec",),
    ),
    Reliance(
        "masked: a layer says what its cache is",
        "model_executor/layers/attention/attention.py",
        "Attention.get_kv_cache_spec",
        ("self", "vllm_config"),
        exact=True,
    ),
    Reliance(
        "masked: a layer writes its keys where the runner's mapping says",
        "model_executor/layers/attention/attention.py",
        "get_attention_context",
        ("layer_name",),
        ("slot_mapping",),
    ),
    Reliance(
        "masked: which is a view of what a model state is given",
        "v1/worker/gpu/attn_utils.py",
        "build_slot_mappings_by_layer",
        ("slot_mappings", "kv_cache_config"),
        ("kv_cache_groups", "layer_names"),
    ),
    *(
        Reliance(
            "masked: attention without a mask",
            f"v1/attention/backends/{file}.py",
            f"{backend}.supports_non_causal",
        )
        for file, backend in (
            ("cpu_attn", "CPUAttentionBackend"),
            ("flash_attn", "FlashAttentionBackend"),
            ("triton_attn", "TritonAttentionBackend"),
        )
    ),
    Reliance(
        "masked: a sampler of ours, and no tokens beside the speculative ones",
        "v1/worker/gpu/model_runner.py",
        "GPUModelRunner.load_model",
        (),
        ("init_model_state", "num_new_sampled_tokens_per_step", "custom_sampler"),
    ),
    Reliance(
        "masked: the sampler gets the hidden states that the model state asks for",
        "v1/worker/gpu/model_runner.py",
        "GPUModelRunner.sample",
        ("hidden_states", "input_batch"),
        ("logits_indices", "compute_logits", "sampler"),
    ),
    Reliance(
        "masked: what it says of rejected tokens",
        "v1/worker/gpu/model_runner.py",
        "GPUModelRunner.postprocess_sampled",
        ("num_sampled", "num_rejected"),
        ("output_bin_counts", "post_update"),
    ),
    *(
        Reliance("masked: what a sampler gives", "v1/worker/gpu/sample/output.py", f"SamplerOutput.{field}")
        for field in ("sampled_token_ids", "logprobs_tensors", "num_nans", "num_sampled", "num_rejected")
    ),
    *(
        Reliance("masked: a request that comes, or comes back", "v1/core/sched/output.py", f"NewRequestData.{field}")
        for field in ("prompt_token_ids", "prefill_token_ids")
    ),
    *(
        Reliance("masked: what is not for videos", "sampling_params.py", f"SamplingParams.{field}")
        for field in ("n", "logprobs", "prompt_logprobs", "stop", "stop_token_ids", "ignore_eos", "max_tokens")
    ),
    *(
        Reliance(f"Lumos-1: {purpose}", f"model_executor/{file}.py", symbol, parameters, reads)
        for purpose, file, symbol, parameters, reads in (
            (
                "which heads a rank has",
                "layers/linear",
                "QKVParallelLinear.__init__",
                ("hidden_size", "head_size", "total_num_heads", "total_num_kv_heads", "bias", "prefix", "return_bias"),
                ("total_num_heads", "num_heads", "num_kv_heads", "num_kv_head_replicas"),
            ),
            ("fused tensors say what they are", "layers/linear", "QKVParallelLinear.load_weights", (), ("shard_id",)),
            ("output projection", "layers/linear", "RowParallelLinear.__init__", ("return_bias", "prefix"), ()),
            ("norm", "layers/layernorm", "RMSNorm.__init__", ("hidden_size", "eps"), ()),
            (
                "embedding",
                "layers/vocab_parallel_embedding",
                "VocabParallelEmbedding.__init__",
                ("num_embeddings", "embedding_dim"),
                ("tp_size",),
            ),
            ("visual rows", "layers/vocab_parallel_embedding", "ParallelLMHead", (), ("VocabParallelEmbedding",)),
            (
                "MLP",
                "models/llama",
                "LlamaMLP.__init__",
                ("hidden_size", "intermediate_size", "hidden_act", "quant_config", "prefix"),
                (),
            ),
            ("weights", "models/utils", "AutoWeightsLoader.load_weights", ("weights", "mapper"), ()),
            ("names of fused weights", "models/utils", "WeightsMapper.orig_to_new_stacked", (), ()),
            ("layers", "models/utils", "make_layers", ("num_hidden_layers", "layer_fn", "prefix"), ()),
            ("names", "models/utils", "maybe_prefix", ("prefix", "name"), ()),
            ("quantisation", "models/interfaces", "SupportsQuant", (), ("quant_config",)),
        )
    ),
    Reliance(
        "Lumos-1: logits of all ranks",
        "distributed/communication_op.py",
        "tensor_model_parallel_all_gather",
        ("input_", "dim"),
    ),
    Reliance(
        "masked: backends that see a whole frame come first",
        "config/attention.py",
        "AttentionConfig.use_non_causal",
    ),
    Reliance(
        "V2 runner: part of a row",
        "v1/worker/gpu/buffer_utils.py",
        "StagedWriteTensor.stage_write",
        ("self", "index", "start", "x"),
        exact=True,
    ),
    Reliance("V2 runner: all parts", "v1/worker/gpu/buffer_utils.py", "StagedWriteTensor.apply_write", ("self",)),
    Reliance("worker: numbers to the device, unwaited", "utils/torch_utils.py", "async_tensor_h2d", ("data", "device")),
    *(
        Reliance("V2 runner: a request that comes", "v1/core/sched/output.py", f"NewRequestData.{field}")
        for field in ("req_id", "sampling_params", "prompt_len")
    ),
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
    parameters = _parameters(node)
    missing = set(reliance.parameters) - parameters
    if missing:
        return HookCheck(reliance.name, False, f"{where} no longer takes {', '.join(sorted(missing))}")
    added = parameters - set(reliance.parameters)
    if reliance.exact and added:
        return HookCheck(reliance.name, False, f"{where} takes more than it did: {', '.join(sorted(added))}")
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
