"""What of vLLM this package wraps, subclasses or uses: one table.

From it follow what is installed (`vllm_packcache.hooks.install`), what ``vllm-packcache doctor`` and the tests look up
in vLLM's source (`vllm_packcache.hooks.contract`), and the page ``docs/hooks.md``. Reading it imports
nothing of vLLM's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from packaging.version import Version


class Kind(StrEnum):
    """What we do to a place of vLLM's."""

    WRAPPED = "wrapped"
    SUBCLASSED = "subclassed"
    USED = "used"


@dataclass(frozen=True)
class Place:
    """One name of vLLM's, and what must be true of it.

    Args:
        why: what it is used for.
        module: of vLLM's.
        symbol: a function, class, method (``Class.method``), field (``Class.field``) or imported name.
        parameters: parameters that the function must have, in any order.
        exact: it must have no other parameters, because a function of ours with just these stands in for it.
        reads: names that its body must call or read, in this order.
        override: ``module:Class.method`` of ours, which takes the parameters that vLLM's method takes; or empty.
    """

    why: str
    module: str
    symbol: str
    parameters: tuple[str, ...] = ()
    exact: bool = False
    reads: tuple[str, ...] = ()
    override: str = ""


_STATEMENT = re.compile(r"(?P<names>[\w.]+(, [\w.]+)*)(?P<call>\((?P<parameters>[^)]*)\))?(: (?P<reads>\w+(, \w+)*))?")


@dataclass(frozen=True)
class Hook:
    """One row: names of one module or class of vLLM's that serve one purpose.

    ``what`` states them, separated by semicolons. ``a, b`` must be there. ``f(a, b)`` must be a function that takes
    just these parameters, ``f(a, ...)`` one that takes others too. ``f: a, b`` must read or call the names ``a`` and
    ``b`` in this order. In the row of a subclass, a name without parameters takes those of our method.

    Args:
        owner: ``module`` or ``module:Class`` of vLLM's.
        what: statements of what must be there.
        why: what for. The words before the colon are its section of the page.
        wrapper: ``module:function`` of ours, which takes vLLM's function and returns what takes its place.
        subclass: ``module:Class`` of ours, which derives from the owner.
        ends: what vLLM would have to offer so that the row can go; empty: see `ENDS`.
        since: the first minor version that it is true of; empty: the oldest that is supported.
        until: the last minor version that it is true of; empty: the newest that is supported.
        asks: by this a policy is asked for. It is there whenever it can be, so that a policy is never ignored.
    """

    owner: str
    what: str
    why: str
    wrapper: str = ""
    subclass: str = ""
    ends: str = ""
    since: str = ""
    until: str = ""
    asks: bool = False

    @property
    def section(self) -> str:
        """Of the page: the words of ``why`` before the colon."""
        return self.why.partition(": ")[0]

    @property
    def ended_by(self) -> str:
        """``ends``, or what ends all rows of its section."""
        return self.ends or ENDS.get(self.section, "")

    @property
    def kind(self) -> Kind:
        """Whether it is wrapped, subclassed or used."""
        return Kind.WRAPPED if self.wrapper else Kind.SUBCLASSED if self.subclass else Kind.USED

    @property
    def module(self) -> str:
        """The module of vLLM's."""
        return self.owner.partition(":")[0]

    @property
    def symbol(self) -> str:
        """The first name in its module: of what is wrapped, the only one."""
        return self.places()[0].symbol

    def places(self) -> tuple[Place, ...]:
        """Each name, with what must be true of it."""
        return tuple(self._places())

    def true_of(self, version: Version) -> bool:
        """Whether the row is about this version of vLLM."""
        minor = version.release[:2]
        first, last = (Version(bound).release[:2] if bound else minor for bound in (self.since, self.until))
        return first <= minor <= last

    def _places(self) -> Iterator[Place]:
        owner = self.owner.partition(":")[2]
        for statement in self.what.split("; "):
            match = _STATEMENT.fullmatch(statement)
            if match is None:
                raise ValueError(f"hook {self.why!r}: cannot read {statement!r}")
            parameters = tuple(filter(None, (match["parameters"] or "").split(", ")))
            for name in match["names"].split(", "):
                yield Place(
                    self.why,
                    self.module,
                    f"{owner}.{name}" if owner else name,
                    tuple(parameter for parameter in parameters if parameter != "..."),
                    match["call"] is not None and "..." not in parameters,
                    tuple((match["reads"] or "").split(", ")) if match["reads"] else (),
                    f"{self.subclass}.{name}" if self.subclass and owner and match["call"] is None else "",
                )


_REQUESTS = "a way to check a request's extra options with its raw body"
_SCHEDULING = "a way to bound a request's prefill chunks"
_ACCOUNTS = "statistics and life-cycle events that a plugin can extend"
_V1 = "the end of the V1 runner"
_V2 = "a published ModelState interface"
_RETENTION = "block retention as a KV cache manager's published interface"
_ATTENTION = "a registry of attention backends that plugins can extend without naming one"
_CANVAS = "frames made in passes by vLLM's own diffusion runner"

_ISSUES = "https://github.com/vllm-project/vllm/issues"
_REGISTRY = f"specs of plugins in the registry that came with [37505]({_ISSUES}/37505), before the built-in ones"
_CUSTOMIZED = f"a backend that may change its layers' spec in every release, see [42449]({_ISSUES}/42449)"

ENDS = {
    "Emu3": "these models in vLLM itself",
    "Lumos-1": "the model in vLLM itself",
    "V1 runner": _V1,
    "V2 runner": _V2,
    "attention": _ATTENTION,
    "guidance": "requests of several sequences that share their sampled tokens",
    "flag": "command line options that plugins may add",
    "ids": "a grammar by place in vLLM's structured outputs",
    "keys": "the layout of cached keys as an attention backend's published interface",
    "manager": _RETENTION,
    "masked": _CANVAS,
    "history": "blocks of a cache in formats of their own, and attention layers that are told what to read",
    "metrics": _ACCOUNTS,
    "plugin": "a plugin that is told by every process where it is loaded",
    "prefix cache": _RETENTION,
    "request": _REQUESTS,
    "rotation": "rotation of cached keys as a rotary embedding's published interface",
    "schedule": _SCHEDULING,
    "session": "sessions whose cache a plugin bounds, see [53876](https://github.com/vllm-project/vllm/issues/53876)",
    "scheduler": _SCHEDULING,
    "spec": _REGISTRY,
    "start-up": "a check of the finished configuration that plugins may add",
    "video": "endpoint plugins that may ask whether the engine would take a request, and when it has begun",
    "worker": "a published interface of workers",
}
"""By section: what would end its rows, where a row does not name anything else."""

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_BACKEND = "vllm.v1.attention.backend"
_LAYER = "vllm.model_executor.layers.attention.attention"
_ROTARY = "vllm.model_executor.layers.rotary_embedding"

HOOKS: tuple[Hook, ...] = (
    # What asks for a policy
    Hook(
        "vllm.engine.arg_utils:EngineArgs",
        "add_cli_args(parser)",
        "flag: kept in additional_config while the command line is parsed",
        wrapper="vllm_packcache.hooks.flags:add_flags",
        asks=True,
    ),
    Hook(
        "vllm.engine.arg_utils:EngineArgs",
        "create_engine_config(self, ...)",
        "start-up: what cannot be right is refused before anything loads",
        wrapper="vllm_packcache.hooks.startup:check_engine_config",
        asks=True,
    ),
    Hook(
        "vllm.engine.arg_utils",
        "AsyncEngineArgs.add_cli_args(parser, ...): load_general_plugins, add_cli_args; "
        "EngineArgs.from_cli_args(cls, args, ...): fields, getattr, hasattr; EngineArgs.additional_config",
        "flag: plugins load before the parser is built, and fields are copied from what was parsed",
    ),
    # Loading
    Hook("vllm", "__version__", "plugin: vLLM's version"),
    Hook("vllm.plugins", "load_general_plugins", "plugin: vLLM loads it"),
    Hook(
        "vllm.v1.engine.core:EngineCore",
        "__init__: load_general_plugins, model_executor",
        "plugin: loads in the engine core",
    ),
    Hook(
        "vllm.v1.worker.worker_base:WorkerWrapperBase",
        "init_worker: load_general_plugins",
        "plugin: loads in the workers",
    ),
    Hook(
        "vllm.v1.worker.worker_base:WorkerWrapperBase",
        "init_device(self): worker, init_device",
        "plugin: a model runner that the other hooks do not reach is refused before the model loads",
        wrapper="vllm_packcache.hooks.startup:check_model_runner",
        ends="the same hooks in every model runner",
    ),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker",
        "init_device: _init_workspace_and_model_runner; _init_workspace_and_model_runner: model_runner",
        "plugin: a worker makes its model runner before the model loads, and keeps it",
    ),
    Hook("vllm.v1.worker.cpu_worker:CPUWorker", "init_device: model_runner", "plugin: a worker of a CPU does so too"),
    Hook("vllm.platforms.interface:Platform", "device_name, is_cpu, is_cuda", "plugin: which platform"),
    Hook(
        "vllm.engine.arg_utils:EngineArgs",
        "_api_process_count, _api_process_rank",
        "plugin: which process says that it is on",
    ),
    # Start-up
    Hook("vllm.config.vllm:VllmConfig", "additional_config", "start-up: configuration in every process"),
    Hook("vllm.config", "get_current_vllm_config", "start-up: configuration while a model is built"),
    Hook("vllm.config.vllm:VllmConfig", "use_v2_model_runner", "start-up: which runner"),
    Hook(
        "vllm.config.vllm:VllmConfig",
        "model_config, parallel_config, cache_config, speculative_config, kv_transfer_config",
        "start-up: what is refused",
    ),
    Hook(
        "vllm.config.model:ModelConfig",
        "model, hf_text_config, use_mla, is_hybrid, is_attention_free, has_inner_state, is_encoder_decoder, "
        "is_diffusion, get_sliding_window, rswa_window, is_mm_prefix_lm, uses_alibi, using_transformers_backend; "
        "__post_init__: runner_type",
        "start-up: models that are refused",
    ),
    Hook(
        "vllm.config.model:ModelConfig",
        "get_and_verify_max_len(self, max_model_len)",
        "start-up: re-based sequences may be longer than the model has positions",
        wrapper="vllm_packcache.hooks.startup:find_position_limit",
        ends="a limit of positions apart from that of lengths",
    ),
    Hook(
        "vllm.config.attention:AttentionConfig",
        "backend, backend_per_kind",
        "start-up: the attention backend that the operator names",
    ),
    Hook("vllm.config.model:ModelConfig", "uses_mrope", "start-up: positions with three axes"),
    Hook(
        "vllm.config.cache:CacheConfig",
        "kv_offloading_size, cache_dtype, kv_sharing_fast_prefill",
        "start-up: cache options that are refused",
    ),
    Hook(
        "vllm.config.parallel:ParallelConfig",
        "decode_context_parallel_size, pipeline_parallel_size, prefill_context_parallel_size, use_ubatching",
        "start-up: parallelism that is refused",
    ),
    # Requests
    *(
        Hook(
            f"vllm.entrypoints.{owner}",
            f"{method}(self, request, raw_request)",
            "request: what an endpoint would ignore is HTTP 400, and what a client leaves out is known",
            wrapper="vllm_packcache.hooks.requests:read_body",
        )
        for owner, method in (
            ("openai.completion.serving:OpenAIServingCompletion", "create_completion"),
            ("openai.chat_completion.serving:OpenAIServingChat", "create_chat_completion"),
            ("openai.chat_completion.batch_serving:OpenAIServingChatBatch", "create_batch_chat_completion"),
            ("openai.responses.serving:OpenAIServingResponses", "create_responses"),
            ("scale_out.token_in_token_out.serving:ServingTokens", "serve_tokens"),
        )
    ),
    *(
        Hook(f"vllm.entrypoints.{owner}", fields, "request: where its options are")
        for owner, fields in (
            ("openai.completion.protocol:CompletionRequest", "vllm_xargs, max_tokens, use_beam_search"),
            (
                "openai.chat_completion.protocol:ChatCompletionRequest",
                "vllm_xargs, max_tokens, max_completion_tokens, use_beam_search",
            ),
            ("openai.responses.protocol:ResponsesRequest", "vllm_xargs, max_output_tokens"),
            (
                "scale_out.token_in_token_out.protocol:GenerateRequest",
                "sampling_params, is_sampling_param_provided",
            ),
            ("generate.base.serving:GenerateBaseServing", "__init__: input_processor"),
        )
    ),
    Hook(
        "vllm.config.model:ModelConfig",
        "override_generation_config, logits_processors",
        "request: what the operator gives",
    ),
    Hook(
        "vllm.v1.engine.input_processor:InputProcessor",
        "process_inputs(self, request_id, prompt, params, supported_tasks, ...)",
        "request: bad options, and what can never fit, are HTTP 400",
        wrapper="vllm_packcache.hooks.requests:check_request",
    ),
    Hook(
        "vllm.v1.engine.input_processor:InputProcessor",
        "__init__(vllm_config, ...): vllm_config, model_config",
        "request: the configuration at hand",
    ),
    Hook("vllm.config.cache:CacheConfig", "num_gpu_blocks, block_size", "request: blocks that there are"),
    Hook(
        "vllm.config.parallel:ParallelConfig",
        "data_parallel_size, data_parallel_size_local, data_parallel_rank_local, local_engines_only",
        "request: engines whose blocks a front end adds up",
    ),
    Hook(
        "vllm.v1.engine.core_client:MPClient",
        "_apply_ready_response: num_gpu_blocks, num_gpu_blocks",
        "request: where they are added up",
    ),
    Hook("vllm.exceptions", "VLLMValidationError", "request: the error that becomes HTTP 400"),
    Hook(
        "vllm.v1.engine:EngineCoreRequest",
        "prompt_token_ids, prompt_embeds, mm_features, sampling_params, resumable",
        "request: what arrives",
    ),
    Hook(
        "vllm.multimodal.inputs",
        "MultiModalFeatureSpec.mm_position; PlaceholderRange: offset, length",
        "request: where pictures without ids are",
    ),
    Hook("vllm.sampling_params:SamplingParams", "extra_args", "request: its options"),
    Hook(
        "vllm.v1.request:Request",
        "__init__(request_id, prompt_token_ids, sampling_params, pooling_params, cache_salt, block_hasher, ...): "
        "request_id, sampling_params, prompt_token_ids, num_prompt_tokens, _all_token_ids, "
        "num_in_flight_tokens, num_preemptions, block_hashes, _block_hasher, resumable",
        "request: what the scheduler knows; a second stream's own condition has the hashes of a prompt",
    ),
    # KV cache specs and managers
    Hook(
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "merge; max_memory_usage_bytes: max_model_len, page_size_bytes",
        "spec: a layer's spec carries its policy, and says what the longest request takes",
        subclass="vllm_packcache.engine.spec:RetentionSpec",
        ends=_RETENTION,
    ),
    Hook("vllm.config.vllm:VllmConfig", "max_concurrent_batches", "spec: steps in flight"),
    Hook(
        "vllm.v1.kv_cache_interface",
        "AttentionSpec, KVCacheSpec.block_size, KVCacheConfig.kv_cache_groups, KVCacheGroupSpec.kv_cache_spec",
        "spec: what a backend is asked about, and groups of layers",
    ),
    Hook(
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry",
        "register(kvcache_spec_cls, manager_class, uniform_type_base_spec, ...); "
        "_ensure_registered: _REGISTRY_KVCACHESPEC_LIST",
        "spec: registry, in which built-in specs come first",
    ),
    Hook(
        "vllm.v1.worker.utils",
        "customize_attention_spec(backend, spec, ...): customize_spec",
        "spec: asks the backend",
        ends=_CUSTOMIZED,
    ),
    Hook(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
        "get_num_blocks_to_allocate: num_tokens, req_to_blocks; allocate_new_blocks; cache_blocks; "
        "remove_skipped_blocks; pop_blocks_for_free; take_pending_cow_copies",
        "manager: counts what a request holds, is told the request, frees blocks, and knows when a request ends",
        subclass="vllm_packcache.engine.manager:RetentionManager",
    ),
    Hook(
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager",
        "__init__(kv_cache_spec, block_pool, enable_caching, kv_cache_group_id, ...): "
        "block_size, block_pool, enable_caching, req_to_blocks, _null_block; "
        "free(request_id, ...): pop_blocks_for_free",
        "manager: what it has, and freeing ends with pop_blocks_for_free",
    ),
    Hook(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator",
        "cache_blocks(request, ...): enable_caching, cache_blocks; "
        "__init__: single_type_managers, get_manager_for_kv_cache_spec",
        "manager: one for each group, asked to cache where it does",
    ),
    Hook(
        "vllm.v1.core.kv_cache_manager:KVCacheManager",
        "__init__: coordinator; allocate_slots(request, ...): "
        "remove_skipped_blocks, num_in_flight_tokens, allocate_new_blocks, cache_blocks",
        "manager: found from above, frees before it allocates, caches after",
    ),
    Hook(
        "vllm.v1.core.block_pool:BlockPool",
        "__init__: num_gpu_blocks, null_block, is_null; free_blocks(ordered_blocks, ...)",
        "manager: the null block, and freeing in order",
    ),
    # The scheduler
    Hook(
        _SCHEDULER,
        "_reserve_prefill_lookahead(self, request, num_computed_tokens, num_new_tokens)",
        "scheduler: prefill chunks end where the policy needs it",
        wrapper="vllm_packcache.engine.manager:bound_chunks",
    ),
    Hook(
        _SCHEDULER,
        "schedule(self, throttle_prefills): running, "
        "_reserve_prefill_lookahead, allocate_slots, _handle_blocked_waiting_request, _get_local_prefix_cache_hit, "
        "_reserve_prefill_lookahead, allocate_slots, scheduled_spec_decode_tokens, take_kv_cache_block_copies, "
        "_free_cow_retained_blocks, _update_after_schedule",
        "scheduler: chunks end after every other bound, of running and of waiting requests; a step tells the workers "
        "what lives of videos whose policy reads tokens; passes of a canvas are counted as they are scheduled; a fork "
        "waits for what another one computes, finds it, and has copied what it writes to",
        wrapper="vllm_packcache.engine.manager:tell_workers",
        ends=_RETENTION,
    ),
    Hook(
        _SCHEDULER,
        "_update_after_schedule: num_computed_tokens, num_in_flight_tokens; "
        "update_from_output: num_in_flight_tokens, _update_request_with_output, grammar_compile_error_reqs, "
        "finish_requests, FINISHED_ERROR, EngineCoreOutput",
        "scheduler: steps count as in flight once scheduled, and a request that cannot go on ends with an error",
    ),
    Hook(
        _SCHEDULER,
        "_get_local_prefix_cache_hit(request, ...): get_computed_blocks",
        "prefix cache: the scheduler looks a prefix up",
    ),
    Hook(
        "vllm.v1.core.kv_cache_manager:KVCacheManager",
        "get_computed_blocks(request, ...): find_longest_cache_hit",
        "prefix cache: a hit ends with the condition",
        wrapper="vllm_packcache.engine.manager:cap_prefix_hits",
        ends="prefix hits that a KV cache manager may shorten",
    ),
    Hook(
        "vllm.v1.core.kv_cache_manager:KVCacheManager",
        "truncate_computed_blocks(blocks, num_computed_tokens, ...)",
        "prefix cache: shorten a hit",
    ),
    # Sessions
    Hook(
        _SCHEDULER,
        "_update_request_as_session(self, session, update): "
        "num_computed_tokens, _all_token_ids, block_hashes, prompt_token_ids, num_prompt_tokens, sampling_params",
        "session: a turn is checked, tells the workers anew what lives, and forgets frames that are long gone",
        wrapper="vllm_packcache.engine.manager:resume_sessions",
    ),
    Hook(
        _SCHEDULER,
        "_handle_stopped_request(self, request): resumable, streaming_queue, _update_request_as_session",
        "session: the time of a frame ends with its turn",
        wrapper="vllm_packcache.engine.manager:end_turns",
        ends=_ACCOUNTS,
    ),
    Hook(
        "vllm.v1.request:Request",
        "update_block_hashes: block_hashes",
        "session: lists of the sequence, of which tokens that are forgotten are taken out",
    ),
    Hook(
        _RUNNER_V1,
        "_update_streaming_request(self, req_id, new_req_data): "
        "remove_request, prompt_token_ids, sampling_params, num_computed_tokens",
        "session: the V1 runner hears anew what lives, and of each frame's seed",
        wrapper="vllm_packcache.worker.runner_v1:resume_sessions",
        ends=_V1,
    ),
    Hook(
        "vllm.plugins",
        "load_endpoint_plugins(supported_tasks)",
        "session: routes on vLLM's own server, behind its key, and the engine that they reach",
        wrapper="vllm_packcache.hooks.routes:offer_routes",
        ends="endpoint plugins that no environment variable has to name",
    ),
    Hook(
        "vllm.plugins.endpoint_plugins.interface",
        "attach_endpoint_plugins(app, supported_tasks): load_endpoint_plugins, attach_router; "
        "init_endpoint_plugins_state(engine_client, state, args): init_state",
        "session: where a server asks for routes",
        ends="endpoint plugins that no environment variable has to name",
    ),
    Hook(
        "vllm.v1.engine.output_processor:OutputProcessor",
        "_update_streaming_request_state(self, req_state, request, prompt): "
        "resumable, input_chunk_queue, apply_streaming_update",
        "session: a front end forgets what earlier turns have made",
        wrapper="vllm_packcache.hooks.sessions:forget_turns",
        ends=_ACCOUNTS,
    ),
    Hook(
        "vllm.v1.engine.output_processor:RequestState",
        "__init__: prompt_token_ids, detokenizer, sent_tokens_offset, input_chunk_queue; "
        "apply_streaming_update: prompt_token_ids, prompt_len",
        "session: what it would remember",
    ),
    Hook("vllm.v1.engine.detokenizer:IncrementalDetokenizer", "__init__: token_ids", "session: what it has made"),
    Hook(
        "vllm.v1.engine.async_llm:AsyncLLM",
        "generate(prompt, sampling_params, request_id, ...); "
        "_add_streaming_input_request(request_id, input_stream, sampling_params, ...): "
        "process_inputs, assign_request_id",
        "session: one request whose prompt grows",
    ),
    Hook(
        "vllm.engine.protocol",
        "StreamingInput.prompt, StreamingInput.sampling_params, EngineClient",
        "session: a turn",
    ),
    Hook("vllm.inputs.engine", "tokens_input(prompt_token_ids, ...)", "session: ids of a turn"),
    Hook("vllm.v1.engine.exceptions", "EngineDeadError", "session: the engine has stopped"),
    Hook("vllm.config.parallel:ParallelConfig", "_api_process_count", "session: one API server knows them"),
    # Videos over HTTP
    Hook(
        "vllm.v1.engine.async_llm:AsyncLLM",
        "errored, get_supported_tasks; check_admission(n, request_id, ...); add_request: errored, EngineDeadError, "
        "get_supported_tasks; __init__: vllm_config, input_processor",
        "video: what the engine would say of a request is known before its client is answered",
    ),
    Hook(
        "vllm.v1.engine.input_processor:InputProcessor",
        "assign_request_id: external_req_id, request_id",
        "video: the engine's name of a request begins with the video's, by which it is known what was admitted",
    ),
    Hook(
        "vllm.sampling_params",
        "SamplingParams.stream_interval, SamplingParams.detokenize, SamplingParams.output_kind, "
        "RequestOutputKind.DELTA",
        "video: one output a frame",
    ),
    # Metrics
    Hook(
        _SCHEDULER,
        "_preempt_request: _free_request_blocks, num_computed_tokens",
        "metrics: preemptions of videos are counted; a preempted request starts anew",
        wrapper="vllm_packcache.engine.metrics:count_preemptions",
    ),
    Hook(
        _SCHEDULER,
        "_free_request(request, ...): _free_blocks",
        "metrics: a line in the log for every video that ends",
        wrapper="vllm_packcache.engine.metrics:log_videos",
    ),
    Hook(
        _SCHEDULER,
        "make_stats: SchedulerStats",
        "metrics: counts travel to the front end with vLLM's own",
        wrapper="vllm_packcache.engine.metrics:send_counts",
    ),
    Hook(
        "vllm.v1.metrics.loggers:StatLoggerManager",
        "__init__(vllm_config, ...): engine_indexes, stat_loggers, PrometheusStatLogger",
        "metrics: and are published there",
        wrapper="vllm_packcache.engine.metrics:publish_counts",
    ),
    Hook(
        "vllm.v1.metrics.loggers:StatLoggerManager",
        "record(scheduler_stats, ...): stat_loggers, record",
        "metrics: handed out in the order of the loggers",
    ),
    Hook(
        "vllm.v1.metrics.loggers:AggregateStatLoggerBase",
        "record, log_engine_initialized",
        "metrics: a logger of ours",
        subclass="vllm_packcache.engine.metrics:VideoMetrics",
    ),
    Hook("vllm.v1.metrics.stats:SchedulerStats", "num_kv_fetch_reqs_by_stage", "metrics: what travels with them"),
    Hook(
        _SCHEDULER,
        "__init__(kv_cache_config, ...): kv_cache_config",
        "metrics: the scheduler's pool of blocks",
    ),
    Hook(
        "vllm.v1.kv_cache_interface",
        "KVCacheConfig.kv_cache_tensors, KVCacheConfig.num_blocks, KVCacheTensor.size",
        "metrics: bytes of a block",
    ),
    Hook("vllm.v1.request:Request", "get_finished_reason", "metrics: why a request ended"),
    Hook("vllm.v1.engine:FinishReason", "__str__", "metrics: reasons to end a request"),
    # Attention
    Hook(
        _LAYER,
        "get_attn_backend",
        "attention: layers get a KV cache spec with a policy, and a metadata builder that compacts block tables",
        wrapper="vllm_packcache.hooks.startup:choose_backend",
    ),
    Hook(
        f"{_LAYER}:Attention",
        "__init__: head_size, attn_backend, get_impl_cls, kv_cache",
        "attention: a layer asks for its backend",
    ),
    Hook(
        f"{_BACKEND}:AttentionBackend",
        "customize_spec; get_builder_cls",
        "attention: a backend changes the spec, and has a builder",
        subclass="vllm_packcache.worker.attention:RetainingBackend",
    ),
    Hook(
        f"{_BACKEND}:AttentionMetadataBuilder",
        "build(self, common_prefix_len, common_attn_metadata, fast_build); get_cudagraph_support; "
        "supports_update_block_table",
        "attention: a builder compacts, anew each step",
        subclass="vllm_packcache.worker.attention:RetainingBuilder",
    ),
    Hook(
        _BACKEND,
        "AttentionBackend.full_cls_name: __qualname__; AttentionCGSupport.NEVER; "
        "AttentionMetadataBuilder.__init__(kv_cache_spec, ...): kv_cache_spec; "
        "AttentionMetadataBuilder.build_for_cudagraph_capture(common_attn_metadata, ...): build",
        "attention: backends are told apart by name; a builder knows its spec, and builds for a capture",
    ),
    Hook("vllm.config.scheduler:SchedulerConfig", "max_num_seqs", "attention: a builder knows its server"),
    Hook(
        f"{_BACKEND}:CommonAttentionMetadata",
        "query_start_loc, query_start_loc_cpu, seq_lens, seq_lens_cpu_upper_bound, num_reqs, max_query_len, "
        "max_seq_len, block_table_tensor, is_prefilling, req_idx, _num_computed_tokens_cache, "
        "_token_to_req_indices_cache",
        "attention: metadata that is compacted",
    ),
    Hook(
        "vllm.v1.worker.utils:AttentionGroup",
        "create_metadata_builders: copy_with_new_block_size, get_builder_cls; "
        "build_metadata(common_attn_metadata, ...): build, _with_kernel_block_table",
        "attention: a builder's spec has the kernel's blocks; the manager's are split where metadata is built",
    ),
    Hook(
        "vllm.v1.attention.ops.triton_unified_attention",
        "unified_attention(q, k, v, out, cu_seqlens_q, seqused_k, softmax_scale, causal, block_table, ...)",
        "attention: vLLM's Triton kernel, measured beside our own",
    ),
    # Cached keys
    *(
        Hook(
            f"vllm.v1.attention.backends.{owner}",
            "do_kv_cache_update(kv_cache, slot_mapping, ...): transpose, split, head_size",
            "keys: side by side with the values",
        )
        for owner in ("flash_attn:FlashAttentionImpl", "triton_attn:TritonAttentionImpl", "flashinfer:FlashInferImpl")
    ),
    Hook(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl",
        "do_kv_cache_update(layer, kv_cache, ...): view, chunk, cpu_attn_reshape_and_cache, isa",
        "keys: packed in the first half of a block",
    ),
    Hook(
        "vllm._custom_ops",
        "cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa, ...)",
        "keys: the kernel that packs them",
    ),
    Hook(
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl",
        "_ensure_scale_caches(self, kv_cache): hs, to_f32_units, _k_scale_cache, fill_",
        "keys: the scale of a token and head stands behind its numbers, and is 1 at first",
    ),
    Hook(
        f"{_ROTARY}.base:RotaryEmbeddingBase",
        "__init__: base, is_neox_style; _compute_inv_freq(self, base)",
        "rotation: what all rotary embeddings have",
    ),
    *(
        Hook(f"{_ROTARY}.{owner}", what, "rotation: frequencies")
        for owner, what in (
            ("llama3_rope:Llama3RotaryEmbedding", "_compute_inv_freq(base, ...)"),
            ("yarn_scaling_rope:YaRNScalingRotaryEmbedding", "_compute_inv_freq(scaling_factor, ...)"),
            ("linear_scaling_rope:LinearScalingRotaryEmbedding", "__init__: scaling_factors"),
            (
                "mrope:MRotaryEmbedding",
                "_compute_inv_freq(base, ...): scaling_factor; "
                "__init__: scaling_factor, mrope_section, mrope_interleaved",
            ),
        )
    ),
    # The V1 runner
    Hook(
        _RUNNER_V1,
        "initialize_kv_cache(kv_cache_config, ...): kv_cache_config, initialize_kv_cache_tensors",
        "V1 runner: where cached keys lie",
        wrapper="vllm_packcache.worker.runner_v1:find_keys",
    ),
    Hook(
        _RUNNER_V1,
        "_update_states(self, scheduler_output): finished_req_ids, scheduled_new_reqs",
        "V1 runner: what the scheduler tells of requests, when they are known",
        wrapper="vllm_packcache.worker.runner_v1:hear_decisions",
    ),
    Hook(
        _RUNNER_V1,
        "_build_attention_metadata(num_scheduled_tokens, ...): build_metadata",
        "V1 runner: metadata builders learn which requests a step has",
        wrapper="vllm_packcache.worker.runner_v1:publish_step",
    ),
    Hook(
        _RUNNER_V1,
        "_preprocess(scheduler_output, ...): mrope_positions, positions",
        "V1 runner: cached keys are rotated and new tokens positioned before the model runs",
        wrapper="vllm_packcache.worker.runner_v1:position_tokens",
    ),
    Hook(
        _RUNNER_V1,
        "sample_tokens: _sample, _bookkeeping_sync",
        "V1 runner: a token that a chunk of a prefill throws away costs no random number",
        wrapper="vllm_packcache.worker.runner_v1:keep_noise",
    ),
    Hook(
        _RUNNER_V1,
        "execute_model(scheduler_output, ...): "
        "_prepare_inputs, _build_attention_metadata, num_scheduled_tokens, _preprocess, _model_forward; "
        "_prepare_inputs: discard_request_mask, positions, compute_slot_mapping, positions",
        "V1 runner: slots are mapped from positions before metadata is built for named requests and the model runs",
    ),
    Hook(
        _RUNNER_V1,
        "_bookkeeping_sync: num_reqs, discard_request_mask, generators, output_token_ids",
        "V1 runner: which tokens are thrown away, and whose generators are turned back",
    ),
    Hook(
        _RUNNER_V1,
        "__init__: vllm_config, device, requests, input_batch",
        "V1 runner: its configuration and requests",
    ),
    Hook("vllm.v1.worker.cpu_model_runner", "CPUModelRunner: GPUModelRunner", "V1 runner: a CPU's derives from it"),
    Hook("vllm.config.compilation:CompilationConfig", "static_forward_context", "V1 runner: its layers"),
    Hook(
        "vllm.v1.worker.gpu_input_batch",
        "CachedRequestState.sampling_params; CachedRequestState.__post_init__: num_prompt_tokens",
        "V1 runner: a request",
    ),
    Hook(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "req_ids; __init__: num_computed_tokens_cpu, block_table; _make_sampling_metadata: generators",
        "V1 runner: the order of the batch, computed tokens, block tables, and generators that the sampler draws from",
    ),
    Hook(
        "vllm.v1.worker.block_table",
        "MultiGroupBlockTable.__getitem__, BlockTable.get_numpy_array",
        "V1 runner: block table of a group on the host",
    ),
    # The V2 runner
    Hook(
        "vllm.v1.worker.gpu.model_states",
        "resolve_model_state_cls(vllm_config, model, ...)",
        "V2 runner: the model state does all of that",
        wrapper="vllm_packcache.hooks.startup:choose_model_state",
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states",
        "init_model_state: resolve_model_state_cls",
        "V2 runner: asked for when a model has been loaded",
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.interface:ModelState",
        "add_request; remove_request; initialize_kv_cache; preprocess_state; "
        "prepare_attn(self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, "
        "for_capture, ubatch_idx); prepare_inputs; prepare_dummy_inputs",
        "V2 runner: requests come and end, the cache is there, and each step's metadata and positions are made",
        subclass="vllm_packcache.worker.runner_v2:RetainingModelState",
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.interface:ModelState",
        "__init__(vllm_config, model, device, ...): vllm_config, model, device, max_num_tokens",
        "V2 runner: what a model state knows",
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState",
        "prepare_attn(input_batch, ...): build_attn_metadata, seq_lens_cpu_upper_bound, idx_mapping_np; "
        "prepare_inputs: rope_state, prepare_positions, get_positions",
        "V2 runner: metadata is built inside, and positions with three axes",
    ),
    Hook(
        "vllm.v1.worker.gpu.attn_utils",
        "build_attn_metadata(attn_groups, num_reqs, num_tokens, query_start_loc_gpu, query_start_loc_cpu, "
        "max_query_len, seq_lens, seq_lens_cpu_upper_bound, max_seq_len, block_tables, slot_mappings, kv_cache_config, "
        "causal, for_cudagraph_capture, ...): "
        "CommonAttentionMetadata, build_metadata_for_cudagraph_capture, build_metadata",
        "V2 runner: builders build, for a step or for a capture",
    ),
    Hook(
        _RUNNER_V2,
        "execute_model(scheduler_output, dummy_run, ...): finish_requests, add_requests, update_requests, "
        "apply_staged_writes, prepare_inputs, prepare_attn, preprocess_state, prepare_attn, prepare_inputs, "
        "run_fullgraph",
        "V2 runner: requests end and come, slots are mapped, metadata is built, inputs are made, the model runs",
    ),
    Hook(
        _RUNNER_V2,
        "update_requests(self, scheduler_output): scheduled_cached_reqs, append_block_ids, "
        "copy_kv_cache_blocks_inplace",
        "V2 runner: what the scheduler tells of requests, when they are known and blocks of forks have been copied",
        wrapper="vllm_packcache.worker.runner_v2:hear_decisions",
    ),
    Hook(
        _RUNNER_V2,
        "add_requests: _remove_request, req_states, add_request, sampler, add_request; "
        "finish_requests: preempted_req_ids, _remove_request",
        "V2 runner: a request that comes, its length before its sampling; preempted ones are removed",
    ),
    Hook(
        _RUNNER_V2,
        "prepare_attn: gather_block_tables, compute_slot_mappings, positions",
        "V2 runner: slots are mapped by index",
    ),
    Hook(
        _RUNNER_V2,
        "initialize_kv_cache(kv_cache_config, ...): "
        "init_attn_backend, BlockTables, init_kv_cache, model_state, initialize_kv_cache",
        "V2 runner: builders are made, the cache is bound, the model state is told",
    ),
    Hook(
        "vllm.v1.worker.gpu.cudagraph_utils",
        "prepare_inputs_to_capture(model_state, full_cudagraph, ...): make_dummy, prepare_attn",
        "V2 runner: what is captured",
    ),
    Hook(
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        "req_ids, idx_mapping, idx_mapping_np, num_scheduled_tokens, num_computed_tokens_np, positions, num_reqs, "
        "num_tokens, query_start_loc, query_start_loc_np, seq_lens, input_ids, num_draft_tokens_per_req, "
        "logits_indices",
        "V2 runner: a batch",
    ),
    Hook(
        "vllm.v1.worker.gpu.block_table:BlockTables",
        "__init__: block_tables, StagedWriteTensor",
        "V2 runner: block tables of a group",
    ),
    Hook(
        "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor",
        "__init__(size, dtype, device, ...): gpu; stage_write(self, index, start, x); apply_write(self, ...)",
        "V2 runner: rows on the device that the host writes, in parts",
    ),
    Hook(
        "vllm.v1.core.sched.output:NewRequestData",
        "req_id, sampling_params, prompt_len, prompt_token_ids, prefill_token_ids",
        "V2 runner: a request that comes, or comes back",
    ),
    Hook("vllm.utils.torch_utils", "async_tensor_h2d(data, device, ...)", "worker: numbers to the device, unwaited"),
    # Frames made in passes
    Hook(
        "vllm.model_executor.models.registry:_ModelRegistry",
        "register_model(self, model_arch, model_cls, ...)",
        "masked: a model of ours",
    ),
    Hook(
        "vllm.model_executor.models.config:VerifyAndUpdateConfig",
        "verify_and_update_config(vllm_config, ...)",
        "masked: what a model sets in its server's configuration",
    ),
    Hook(
        "vllm.config.vllm:VllmConfig",
        "try_verify_and_update_config: MODELS_CONFIG_MAP, architecture, verify_and_update_config; "
        "__post_init__: try_verify_and_update_config, enforce_eager, check_and_update_config, scheduler_cls, "
        "async_scheduling",
        "masked: found by the model's name; set before graphs are chosen, schedulers after",
    ),
    Hook("vllm.config.diffusion:DiffusionConfig", "canvas_length", "masked: a frame is a canvas"),
    Hook(
        "vllm.config.vllm:VllmConfig",
        "num_speculative_tokens: diffusion_config, canvas_length",
        "masked: and speculative tokens",
    ),
    Hook(
        "vllm.config.scheduler:SchedulerConfig",
        "max_num_batched_tokens, max_num_scheduled_tokens, long_prefill_token_threshold, scheduler_cls",
        "masked: room for a frame in a step",
    ),
    Hook(
        "vllm.config.model:ModelConfig",
        "generation_config, enforce_eager",
        "masked: recommended sampling is for decoders; no graphs",
    ),
    Hook("vllm.config.cache:CacheConfig", "enable_prefix_caching", "masked: no prefix caching"),
    *(
        Hook(
            "vllm.v1.core.sched.diffusion_scheduler",
            base,
            "masked: schedulers of canvases",
            subclass=f"vllm_packcache.engine.scheduler:{ours}",
        )
        for base, ours in (
            ("DiffusionScheduler", "CanvasScheduler"),
            ("DiffusionAsyncScheduler", "CanvasAsyncScheduler"),
        )
    ),
    Hook(
        "vllm.v1.core.sched.diffusion_scheduler",
        "diffusion_canvas_width(request, canvas_length, ...): extra_args, get",
        "masked: a request's canvas",
    ),
    Hook(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
        "allocate_new_blocks; get_num_blocks_to_allocate",
        "masked: blocks of a stream",
        subclass="vllm_packcache.engine.manager:LaterStreamManager",
        ends=_RETENTION,
    ),
    Hook(
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry",
        "get_uniform_type_base_spec(kvcache_spec, ...): uniform_type_base_spec",
        "masked: specs with bases of their own are groups of their own",
    ),
    Hook(
        f"{_LAYER}:Attention",
        "get_kv_cache_spec",
        "masked: a layer says what its cache is",
        subclass="vllm_packcache.models.lumos:StreamAttention",
    ),
    Hook(
        _LAYER,
        "get_attention_context(layer_name, ...): slot_mapping",
        "masked: a layer writes its keys where the runner's mapping says",
    ),
    Hook(
        "vllm.v1.worker.gpu.attn_utils",
        "build_slot_mappings_by_layer(slot_mappings, kv_cache_config, ...): kv_cache_groups, layer_names",
        "masked: which is a view of what a model state is given",
    ),
    *(
        Hook(f"vllm.v1.attention.backends.{owner}", "supports_non_causal", "masked: attention without a mask")
        for owner in (
            "cpu_attn:CPUAttentionBackend",
            "flash_attn:FlashAttentionBackend",
            "triton_attn:TritonAttentionBackend",
        )
    ),
    Hook(
        "vllm.config.attention:AttentionConfig",
        "use_non_causal",
        "masked: backends that see a whole frame come first",
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.interface:ModelState",
        "add_request; remove_request; initialize_kv_cache; preprocess_state; prepare_attn; prepare_inputs; "
        "prepare_dummy_inputs; custom_sampler; prepare_inputs_embeds; postprocess_state",
        "masked: a model state of ours",
        subclass="vllm_packcache.worker.passes:CanvasModelState",
    ),
    # Older frames in fewer bits
    Hook(
        _RUNNER_V2,
        "sample_tokens: sample, postprocess_sampled",
        "history: frames are encoded when a step has run, and before the next one",
    ),
    Hook(
        "vllm.model_executor.layers.attention.attention",
        "unified_kv_cache_update(key, value, layer_name): get_attention_context, do_kv_cache_update",
        "history: keys and values of a step are written before attention reads what was put together",
    ),
    *(
        Hook(
            f"vllm.v1.attention.backends.{owner}",
            "forward(layer, query, key, value, kv_cache, attn_metadata, output, ...)",
            "history: attention over another cache than the layer's",
        )
        for owner in (
            "cpu_attn:CPUAttentionBackendImpl",
            "flash_attn:FlashAttentionImpl",
            "triton_attn:TritonAttentionImpl",
        )
    ),
    # Forks
    Hook(
        "vllm.v1.engine.parallel_sampling:ParentRequest",
        "_get_child_sampling_params(self, index): sampling_params",
        "masked: each of a request's several videos has a seed of its own, and knows whose it is",
        wrapper="vllm_packcache.hooks.forks:seed_forks",
        ends="a seed of each child in a request's extra options",
    ),
    Hook(
        "vllm.v1.engine.parallel_sampling:ParentRequest",
        "__init__: request_id; get_child_info(index, ...): request_id, _get_child_sampling_params",
        "masked: the request whose videos they are",
    ),
    Hook(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
        "_apply_cow(self, request_id, block_idx, source_block, cow_block): req_blocks, _pending_cow_copies, ref_cnt; "
        "take_pending_cow_copies(self): _pending_cow_copies",
        "masked: both blocks of a copy are kept until it is made",
        ends=_RETENTION,
    ),
    Hook(
        "vllm.v1.core.block_pool:BlockPool",
        "touch(self, blocks): ref_cnt; get_new_blocks(self, num_blocks)",
        "masked: blocks that several videos hold",
    ),
    # Guided videos
    Hook(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
        "pop_blocks_for_free",
        "guidance: blocks of second streams, of the same pool, which vLLM does not know of",
        subclass="vllm_packcache.engine.manager:GuidanceManager",
    ),
    Hook(
        "vllm.v1.core.sched.output:SchedulerOutput",
        "scheduled_new_reqs, num_scheduled_tokens",
        "guidance: of which requests the workers are told all blocks of second streams, of which the new ones",
    ),
    Hook("vllm.v1.core.kv_cache_utils:KVCacheBlock", "block_id", "guidance: what the workers are told of a block"),
    Hook(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
        "add_local_computed_blocks(self, request_id, new_computed_blocks, num_local_computed_tokens, "
        "num_external_computed_tokens): touch, num_cached_block",
        "guidance: a second stream's own condition, as far as it was found",
    ),
    Hook(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
        "find_longest_cache_hit(block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, "
        "drop_eagle_block, alignment_tokens, dcp_world_size, pcp_world_size, ...)",
        "guidance: a second stream's own condition is looked up",
    ),
    Hook(
        "vllm.v1.core.block_pool:BlockPool",
        "cache_full_blocks(request, blocks, num_cached_blocks, num_full_blocks, block_size, kv_cache_group_id, ...): "
        "block_hashes, enable_kv_cache_events",
        "guidance: others may find a second stream's own condition",
    ),
    Hook(
        "vllm.v1.core.kv_cache_manager:KVCacheManager",
        "prefix_cache_lookup_enabled(self, request)",
        "guidance: whether a second stream's own condition is looked up",
    ),
    Hook(
        "vllm.v1.worker.gpu.model_states.interface:ModelState",
        "add_request; remove_request; initialize_kv_cache; preprocess_state; prepare_attn; prepare_inputs; "
        "custom_sampler",
        "guidance: requests come and end, and a step's rows of second streams are put together",
        subclass="vllm_packcache.worker.guidance:GuidingModelState",
    ),
    Hook(
        _RUNNER_V2,
        "_dummy_sampler_run: compute_logits, sampler",
        "guidance: memory is measured with the sampler that gets guided logits",
    ),
    Hook(
        "vllm.v1.worker.gpu.sample.sampler:Sampler",
        "__call__(self, logits, input_batch)",
        "guidance: the sampler that gets guided logits",
    ),
    Hook(
        "vllm.v1.worker.gpu.states:RequestState",
        "__init__: all_token_ids, StagedWriteTensor",
        "guidance: ids of requests, on the device",
    ),
    Hook(
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        "is_prefilling_np",
        "guidance: which rows are of a prompt",
    ),
    Hook(
        "vllm.forward_context",
        "set_forward_context(attn_metadata, vllm_config, num_tokens, slot_mapping, ...)",
        "guidance: the model is run with metadata of second streams",
    ),
    # Which ids a video's tokens may have
    Hook(
        "vllm.v1.sample.logits_processor.interface:LogitsProcessor",
        "is_argmax_invariant; update_state; apply",
        "ids: a processor of logits on the V1 runner",
        subclass="vllm_packcache.worker.frame_ids:FrameIdsV1",
        ends=_V1,
    ),
    Hook(
        "vllm.v1.sample.logits_processor.builtin",
        "process_dict_updates(req_entries, batch_update, new_state)",
        "ids: where in the batch each request is",
        ends=_V1,
    ),
    Hook(
        "vllm.v1.sample.logits_processor",
        "build_logitsprocs(vllm_config, device, is_pin_memory, ...): ctor",
        "ids: the V1 runner makes it",
        ends=_V1,
    ),
    Hook(
        "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor",
        "add_request; apply",
        "ids: a processor of logits on the V2 runner",
        subclass="vllm_packcache.worker.frame_ids:FrameIdsV2",
    ),
    Hook(
        "vllm.v1.worker.gpu.sample.logits_processor.interface",
        "LogitsProcRequestState.prompt_len; LogitsContext.idx_mapping_np; LogitsContext.seq_lens_upper_bound_np",
        "ids: how long a request is, on the host",
    ),
    Hook(
        _RUNNER_V2,
        "load_model: init_model_state, num_new_sampled_tokens_per_step, Sampler, custom_sampler; "
        "sample(hidden_states, input_batch, ...): logits_indices, compute_logits, sampler; "
        "postprocess_sampled(num_sampled, num_rejected, ...): output_bin_counts, post_update, all_token_ids, "
        "postprocess_state",
        "masked: a sampler of ours gets hidden states and says which tokens are rejected; guided, it gets the logits "
        "of a step that has been run, and ids that are sampled are put on the device",
    ),
    Hook(
        "vllm.v1.worker.gpu.sample.output:SamplerOutput",
        "sampled_token_ids, logprobs_tensors, num_nans, num_sampled, num_rejected",
        "masked: what a sampler gives",
    ),
    Hook(
        "vllm.sampling_params:SamplingParams",
        "n, logprobs, prompt_logprobs, stop, stop_token_ids, ignore_eos, max_tokens",
        "masked: what is not for videos",
    ),
    # Layers that the Lumos-1 model is made of
    *(
        Hook(f"vllm.{module}", what, f"Lumos-1: {why}")
        for module, what, why in (
            (
                "model_executor.layers.linear:QKVParallelLinear",
                "__init__(hidden_size, head_size, total_num_heads, total_num_kv_heads, bias, prefix, return_bias, "
                "...): total_num_heads, num_heads, num_kv_heads, num_kv_head_replicas; load_weights: shard_id",
                "which heads a rank has, and fused tensors say what they are",
            ),
            (
                "model_executor.layers.linear:RowParallelLinear",
                "__init__(return_bias, prefix, ...)",
                "output projection",
            ),
            ("model_executor.layers.layernorm:RMSNorm", "__init__(hidden_size, eps, ...)", "norm"),
            (
                "model_executor.layers.vocab_parallel_embedding",
                "VocabParallelEmbedding.__init__(num_embeddings, embedding_dim, ...): tp_size; "
                "ParallelLMHead: VocabParallelEmbedding",
                "embedding and visual rows",
            ),
            (
                "model_executor.models.llama:LlamaMLP",
                "__init__(hidden_size, intermediate_size, hidden_act, quant_config, prefix, ...)",
                "MLP",
            ),
            (
                "model_executor.models.utils",
                "AutoWeightsLoader.load_weights(weights, mapper, ...); WeightsMapper.orig_to_new_stacked; "
                "make_layers(num_hidden_layers, layer_fn, prefix, ...); maybe_prefix(prefix, name, ...)",
                "weights, layers and names",
            ),
            ("model_executor.models.interfaces", "SupportsQuant: quant_config", "quantisation"),
            (
                "distributed.communication_op",
                "tensor_model_parallel_all_gather(input_, dim, ...)",
                "logits of all ranks",
            ),
        )
    ),
    # What the Emu3 models are made of
    Hook(
        "vllm.transformers_utils.config",
        "HFConfigParser.parse(model, trust_remote_code, ...): AutoConfig, from_pretrained",
        "Emu3: a configuration that is registered with transformers is read without remote code",
    ),
    Hook(
        "vllm.transformers_utils.config",
        "get_safetensors_params_metadata(model, revision)",
        "Emu3: whether a checkpoint has norms of heads",
    ),
    Hook("vllm.config.model:ModelConfig", "hf_config, revision", "Emu3: which checkpoint"),
    Hook(
        "vllm.model_executor.models.llama:LlamaAttention",
        "__init__(config, ...): head_dim, q_size, kv_size, qkv_proj, o_proj, attn; forward; "
        "_init_rotary_emb(config, ...): rotary_emb",
        "Emu3: attention with norms of heads",
        subclass="vllm_packcache.models.emu3:NormedAttention",
    ),
    Hook(
        "vllm.model_executor.models.llama",
        "LlamaDecoderLayer.__init__(vllm_config, prefix, attn_layer_type, ...): self_attn",
        "Emu3: a layer with another attention",
    ),
    Hook(
        "vllm.model_executor.models.llama:LlamaForCausalLM",
        "__init__(vllm_config, prefix, layer_type, ...)",
        "Emu3: a model of such layers",
        subclass="vllm_packcache.models.emu3:Emu3ForCausalLM",
    ),
)
"""Every place. What is wrapped is put in place in this order, what asks for a policy first."""
