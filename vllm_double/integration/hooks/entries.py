"""The table: what of vLLM the integration and the draft engine call, wrap, override, import or read.

Each entry: target, parameters, what we do with it, why, and the upstream change that would make it superfluous. To add one,
read the function in every supported version; `tests/integration/test_patches.py` tests whether the table is right and complete.
"""

from __future__ import annotations

from vllm_double.integration.hooks.mends import MENDS
from vllm_double.integration.hooks.registry import Entry, Names
from vllm_double.integration.hooks.sampling_entries import SAMPLING

__all__ = ["ENTRIES"]

_CONFIG = "vllm.config"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_SPECULATOR = "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_CACHE = "vllm.v1.core.kv_cache_utils"
_ATTENTION = "vllm.v1.worker.gpu.attn_utils"

_METHODS = "vLLM takes speculative methods from plug-ins, with configuration classes of their own"
_CUSTOM = "vLLM gives custom proposers the scheduler's output, the input batch and the end of requests"
_ONE_TRIP = "vLLM's engine core computes, samples and fetches drafts in one round trip to its workers"
_RAGGED = "V2 takes chains of different lengths from a speculator, after what was sampled is known on the host"
_WEIGHTS = "vLLM informs a proposer that the target's weights change"
_TENANTS = "vLLM sends a request's cache_salt and resets of the prefix cache to its workers"
_LOADER = "vLLM has a public function that loads a model with a paged KV cache outside an engine"

# fmt: off
_FRONT = (
    Entry("vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        "self, target_model_config, target_parallel_config, ...",
        'wrapped: builds our configuration when the method is "double", and names our scheduler',
        "the only place through which every front end's speculative configuration passes", _METHODS),
    Entry("vllm.engine.arg_utils:EngineArgs.add_cli_args", "parser", 'wrapped: --spec-method takes "double"',
        "its choices are vLLM's own methods", _METHODS),
    Entry("vllm.config.speculative:SpeculativeConfig.__post_init__", "self",
        "called by our subclass after it has put the custom class in place of the draft model",
        "derives the configuration that the scheduler and the workers read", _METHODS),
    Entry("vllm.sampling_params:SamplingParams._validate_spec_decode", "self, speculative_config, ...",
        'wrapped: refuses a request whose extra_args["double"] cannot be read, but no min_p or logit_bias',
        "the worker must not fail for one request's mistake; and both are applied behind each draft token",
        "vLLM asks a speculative method which sampling parameters it takes"),
    Entry("vllm.config.vllm:VllmConfig._get_v2_model_runner_unsupported_features", "self",
        "wrapped: method double is not among them",
        "vLLM chooses its model runner by this list, and custom proposers are on it", "V2 supports custom proposers"),
    Entry("vllm.utils.ompmultiprocessing:OMPProcessManager.__init__", "self, config",
        "wrapped: reads VLLM_CPU_OMP_THREADS_BIND while it names the target's cores",
        "draft and target have disjoint cores, and another engine of this process has others",
        "vLLM takes the cores of a CPU's workers from its configuration"),
    Entry("vllm.engine.arg_utils:EngineArgs.create_engine_config", "self, ...",
        "wrapped: scheduler_cls and async_scheduling are the user's again afterwards",
        "the same arguments may make another engine", _METHODS),
    Entry("vllm.v1.worker.gpu.spec_decode:init_speculator", "vllm_config, device, ...", "wrapped: builds our speculator",
        "this is how the V2 runner comes to have it", "V2 supports custom proposers"),
)

_ENGINE_CORE = (
    Entry("vllm.config.scheduler:SchedulerConfig.get_scheduler_cls", "self",
        "relied upon: takes our subclass of the scheduler by its dotted path, scheduler_cls", "a public extension point",
        "never: it is public"),
    Entry(f"{_SCHEDULER}.__init__", "self, vllm_config, ...",
        "overridden: a request that begins with one token gets no placeholders to verify",
        "each would cost the target num_speculative_tokens query tokens that nobody proposed",
        "vLLM schedules no placeholders for proposers with ragged chains"),
    Entry(f"{_SCHEDULER}.schedule", "self, ...",
        "overridden: new requests carry their cache_salt, and the number of prefix cache resets, as attributes",
        "history is kept per tenant, and the draft's prefix cache is to be cold when the target's is", _TENANTS),
    Entry(f"{_SCHEDULER}.update_from_output", "self, scheduler_output, model_runner_output",
        "overridden: keeps the drafts that the worker's output carries",
        "the only place in the engine core through which every output passes", _ONE_TRIP),
    Entry(f"{_SCHEDULER}.reset_prefix_cache", "self, ...", "overridden: counts the resets", "as for schedule", _TENANTS),
    Entry("vllm.v1.executor.multiproc_executor:MultiprocExecutor.take_draft_token_ids", "self",
        "wrapped: returns the drafts that came with the output, and asks the worker if none did", "saves the third round trip",
        _ONE_TRIP),
    Entry("vllm.distributed.device_communicators.shm_broadcast:SpinCondition.wait", "self, timeout_ms=None",
        "wrapped: the engine core sleeps until its workers' answer is announced",
        "it waits by sched_yield in a loop, which takes half of the draft's core",
        "vLLM's engine core can be told to sleep at once while it waits for its workers"),
    Entry("vllm.v1.spec_decode.metrics:SpecDecodingStats.observe_draft", "self, num_draft_tokens, num_accepted_tokens",
        "relied upon: stops the engine if more tokens are accepted than num_speculative_tokens",
        "bounds the length of our chains", "vLLM counts what a proposer proposed, however long it is"),
)

_WORKERS = (
    Entry(f"{_WORKER}.initialize_from_config", "self, kv_cache_config, ...",
        "wrapped: our proposer meets the worker and its runner, and sets attributes on these two objects alone",
        "a proposer is built from the configuration, and learns of neither", "vLLM hands a custom proposer its worker"),
    Entry(f"{_WORKER}.compile_or_warm_up_model", "self",
        "followed, on our own worker: a draft on a GPU is started, and step times are learnt anew",
        "the target measures how much memory is free before, and compiles in its first steps",
        "vLLM informs a proposer that service begins"),
    *(
        Entry(f"{_WORKER}.{name}", parameters, f"followed, on our own worker: history is forgotten{when}",
            "what the target said with other weights foretells nothing", _WEIGHTS)
        for name, parameters, when in (
            ("reload_weights", "self, ...", ""),
            ("update_weights", "self, ...", ""),
            ("finish_weight_update", "self, ...", ""),
            ("sleep", "self, level=1", " at level 2, which gives the weights up"),
            ("add_lora", "self, lora_request", " when an adapter is loaded in place of its former self"),
        )
    ),
    Entry("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", "vllm_config",
        "relied upon: builds our proposer from its dotted path with the configuration alone", "a public extension point",
        "never: it is public"),
)

_RUNNERS = (
    Entry(f"{_V1}.propose_draft_token_ids", "self, scheduler_output, sampled_token_ids, ...",
        "replaced on our own runner: hands the scheduler's output and the input batch to our proposer",
        "custom proposers are called without request ids", _CUSTOM),
    Entry(f"{_V1}._input_fits_in_drafter", "self, common_attn_metadata",
        "replaced on our own runner: always true, chains are clipped row by row",
        "one row close to the model's length takes the drafts of the whole batch away",
        "vLLM leaves the target's maximum length to custom proposers"),
    Entry(f"{_V1}._update_states", "self, scheduler_output", "replaced on our own runner: sees finished requests",
        "a last, empty step returns before anything is sampled", _CUSTOM),
    Entry(f"{_V1}.execute_model", "self, scheduler_output, ...",
        "replaced on our own runner: samples at once if there is no grammar to wait for",
        "the engine core asks for the samples in a second round trip, while the target stands still", _ONE_TRIP),
    Entry(f"{_V1}.sample_tokens", "self, grammar_output", "replaced on our own runner: its output carries the drafts",
        "the engine core asks for the drafts in a third round trip", _ONE_TRIP),
    Entry(f"{_V1}.take_draft_token_ids", "self", "called after sampling: the drafts that the output carries",
        "what the engine core would get in the third round trip", _ONE_TRIP),
    Entry(f"{_V2}.update_requests", "self, scheduler_output",
        "replaced on our own runner: sees requests that ended or are new, and writes what is to be verified to the device",
        "the speculator is told neither, and V2 reads drafts from the device", _CUSTOM),
    Entry(f"{_V2}.execute_model", "self, scheduler_output, intermediate_tensors=None, dummy_run=False, ...",
        "replaced on our own runner: samples at once if there is no grammar to wait for",
        "the engine core asks for the samples in a second round trip, while the target stands still", _ONE_TRIP),
    Entry(f"{_V2}.sample_tokens", "self, grammar_output",
        "replaced on our own runner: proposes, and its output carries the drafts",
        "the speculator is asked before what was sampled is known on the host", _RAGGED),
    Entry(f"{_V2}.take_draft_token_ids", "self", "replaced on our own runner: gives the scheduler the real chains",
        "V2 gives it as many placeholders for every request, which the target would then verify", _RAGGED),
    Entry("vllm.v1.worker.gpu.async_utils:AsyncOutput.get_output", "self", "called after sampling: waits for what was sampled",
        "chains are proposed behind it", _RAGGED),
    Entry(f"{_SPECULATOR}.propose", "self, input_batch, ...",
        "implemented: gives what stands on the device until the next chains are written there",
        "the V2 runner asks before what was sampled is known on the host", _RAGGED),
    *(
        Entry(f"{_SPECULATOR}.{name}", parameters, "implemented: does nothing",
            "the V2 runner has its speculator record graphs, and nothing of ours runs in the target's stream", _RAGGED)
        for name, parameters in (("init_cudagraph_manager", "self, cudagraph_mode"), ("capture", "self"))
    ),
)

_DRAFT_ENGINE = tuple(
    Entry(target, parameters, "called by the draft engine", why, _LOADER)
    for target, parameters, why in (
        ("vllm.model_executor.model_loader:get_model", "*, vllm_config, ...", "loads the draft model"),
        ("vllm.v1.worker.gpu_worker:init_worker_distributed_environment",
            "vllm_config, rank, distributed_init_method=None, local_rank=-1, backend='nccl'",
            "layers ask for their parallel groups"),
        ("vllm.v1.worker.workspace:init_workspace_manager", "device, ...", "attention on a GPU takes its buffers there"),
        (f"{_ATTENTION}:get_kv_cache_spec", "vllm_config", "what a layer keeps of a token"),
        (f"{_CACHE}:get_kv_cache_groups", "vllm_config, kv_cache_spec", "which layers share a block table"),
        (f"{_CACHE}:get_kv_cache_config_from_groups", "vllm_config, kv_cache_groups, available_memory",
            "how many pages there are"),
        ("vllm.v1.attention.backends.utils:resolve_kv_cache_layout", "vllm_config, supported_layouts, kv_cache_specs=None",
            "how a page lies in memory"),
        ("vllm.v1.attention.backends.utils:get_supported_kv_cache_layouts", "backends", "how a page may lie in memory"),
        (f"{_ATTENTION}:init_attn_backend", "kv_cache_config, vllm_config, device", "the builders of attention's metadata"),
        (f"{_ATTENTION}:init_kv_cache", "forward_context, kv_cache_config, device, kernel_block_sizes, vllm_config, ...",
            "allocates the pages and binds them to the layers"),
        ("vllm.v1.attention.backend:AttentionMetadataBuilder.build", "self, common_prefix_len, common_attn_metadata, ...",
            "once for each step"),
        ("vllm.forward_context:set_forward_context", "attn_metadata, vllm_config, num_tokens=None, ...",
            "attention reads it there"),
        ("vllm.ir.op:IrOp.register_impl", "self, provider, *, supported=True, supports_args=None, inplace=False",
            "RMS norms on CPU"),
    )
)

_IMPORTS = tuple(
    Names(*names)
    for names in (
        ("vllm", "envs ir"),
        (_CONFIG, "CUDAGraphMode CompilationMode LoadConfig ModelConfig ParallelConfig SpeculativeConfig VllmConfig"),
        (_CONFIG, "get_layers_from_vllm_config set_current_vllm_config"),
        ("vllm.config.utils", "config"),
        ("vllm.distributed.parallel_state", "get_tensor_model_parallel_rank"),
        ("vllm.distributed.device_communicators.shm_broadcast", "SpinCondition"),
        ("vllm.engine.arg_utils", "EngineArgs"),
        ("vllm.envs", "VLLM_CPU_OMP_THREADS_BIND enable_envs_cache"),
        ("vllm.exceptions", "VLLMValidationError"),
        ("vllm.forward_context", "set_forward_context"),
        ("vllm.ir.op", "set_default_torch_wrap"),
        ("vllm.model_executor.layers.attention", "Attention"),
        ("vllm.model_executor.layers.attention_layer_base", "AttentionLayerBase"),
        ("vllm.model_executor.model_loader", "get_model"),
        ("vllm.model_executor.model_loader.utils", "get_draft_load_config"),
        ("vllm.platforms", "current_platform"),
        ("vllm.sampling_params", "SamplingParams"),
        ("vllm.tokenizers", "get_tokenizer"),
        ("vllm.utils.ompmultiprocessing", "OMPProcessManager"),
        ("vllm.v1.attention.backend", "AttentionCGSupport CommonAttentionMetadata"),
        ("vllm.v1.attention.backends.utils", "get_supported_kv_cache_layouts resolve_kv_cache_layout"),
        (_CACHE, "get_kv_cache_config_from_groups get_kv_cache_groups"),
        ("vllm.v1.core.sched.scheduler", "Scheduler"),
        ("vllm.v1.executor.multiproc_executor", "MultiprocExecutor"),
        ("vllm.v1.kv_cache_interface", "AttentionSpec"),
        ("vllm.v1.outputs", "DraftTokenIds LogprobsTensors ModelRunnerOutput SamplerOutput"),
        ("vllm.v1.sample.logits_processor", "LogitsProcessors"),
        ("vllm.v1.sample.logits_processor.builtin",
            "LogitBiasLogitsProcessor MinPLogitsProcessor MinTokensLogitsProcessor"),
        ("vllm.v1.sample.metadata", "SamplingMetadata"),
        ("vllm.v1.sample.ops.topk_topp_sampler", "apply_top_k_top_p"),
        ("vllm.v1.sample.rejection_sampler", "PLACEHOLDER_TOKEN_ID RejectionSampler"),
        ("vllm.v1.spec_decode.metadata", "SpecDecodeMetadata"),
        ("vllm.v1.worker.gpu", "spec_decode"),
        (_ATTENTION, "get_kv_cache_spec init_attn_backend init_kv_cache"),
        ("vllm.v1.worker.gpu.async_utils", "AsyncOutput"),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
        ("vllm.v1.worker.gpu.sample.gumbel", "gumbel_sample"),
        ("vllm.v1.worker.gpu.spec_decode.speculator", "BaseSpeculator draft_logits supports_mm_inputs"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner create_custom_proposer"),
        ("vllm.v1.worker.gpu_worker", "Worker init_worker_distributed_environment"),
        ("vllm.v1.worker.workspace", "init_workspace_manager"),
        ("vllm.version", "__version__"),
    )
)

_ATTRIBUTES = tuple(
    Names(*names)
    for names in (
        ("vllm.engine.arg_utils:EngineArgs", "async_scheduling scheduler_cls _api_process_count _api_process_rank spec_model"),
        ("vllm.config.parallel:ParallelConfig", "data_parallel_index data_parallel_rank_local _api_process_rank"),
        ("vllm.sampling_params:SamplingParams", "eos_token_id extra_args ignore_eos seed stop_token_ids"),
        (_SCHEDULER, "dynamic_sd_lookup max_num_running_reqs num_spec_tokens requests"),
        ("vllm.v1.core.sched.output:NewRequestData", "lora_request mm_features prefill_token_ids prompt_embeds prompt_len"),
        ("vllm.v1.core.sched.output:SchedulerOutput",
            "finished_req_ids has_structured_output_requests num_scheduled_tokens total_num_scheduled_tokens"),
        ("vllm.v1.core.sched.output:SchedulerOutput", "scheduled_new_reqs scheduled_spec_decode_tokens"),
        (_V1, "_draft_prob_req_ids _draft_probs drafter input_batch rejection_sampler sampler"),
        ("vllm.v1.worker.gpu_input_batch:InputBatch",
            "generators logitsprocs num_computed_tokens_cpu num_tokens_no_spec req_id_to_index req_ids token_ids_cpu"),
        ("vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor", "min_p min_p_count"),
        ("vllm.v1.sample.logits_processor.builtin:LogitBiasLogitsProcessor", "biases"),
        (_V2, "model rejection_sampler req_states sampler speculator"),
        ("vllm.v1.worker.gpu.states:RequestState", "draft_tokens req_id_to_index"),
        ("vllm.distributed.device_communicators.shm_broadcast:SpinCondition", "busy_loop_s last_read"),
    )
)

# fmt: on
ENTRIES: tuple[Entry | Names, ...] = (
    MENDS + _FRONT + _ENGINE_CORE + _WORKERS + _RUNNERS + _DRAFT_ENGINE + SAMPLING + _IMPORTS + _ATTRIBUTES
)
"""Everything; targets of functions are unique (tested)."""
