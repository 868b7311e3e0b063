"""The table: what of vLLM is replaced, and what the integration calls, wraps or expects.

To add an entry, read the function in every supported version, note its lines, and let
`tests/integration/test_patches.py` tell the parameters and the fingerprint.
"""

from __future__ import annotations

from vllm_double.integration.hooks.cpu_sampler import (
    KernelMend,
    expand_in_place,
    recover_padding_from_target,
    reject_padding,
)
from vllm_double.integration.hooks.registry import Entry, Signature
from vllm_double.integration.hooks.sampling_entries import SAMPLING

_CPU_KERNELS = "vllm.utils.cpu_triton_utils"
_MODEL_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner"
_WORKER = "vllm.v1.worker.gpu_worker"


def _lines(path: str, line_031: int, line_032: int) -> dict[str, str]:
    return {"0.31": f"{path}:{line_031}", "0.32": f"{path}:{line_032}"}


def _v2(name: str, method: str, lines: tuple[int, int], signature: str, what: str, why: str) -> Entry:
    return Entry(
        name=name,
        target=f"{_V2_RUNNER}:GPUModelRunner.{method}",
        what=what,
        why=why,
        upstream=_lines("vllm/v1/worker/gpu/model_runner.py", *lines),
        expected=(Signature(signature),),
    )


def _weights(name: str, method: str, lines: tuple[int, int], signature: str, when: str = "") -> Entry:
    return Entry(
        name=name,
        target=f"{_WORKER}:Worker.{method}",
        what=f"wrapped: history is forgotten{when}",
        why="what the target said with other weights foretells nothing",
        upstream=_lines("vllm/v1/worker/gpu_worker.py", *lines),
        expected=(Signature(signature),),
    )


MENDS: tuple[Entry, ...] = (
    Entry(
        name="cpu-expand-in-place",
        target=f"{_CPU_KERNELS}:_expand_kernel_impl",
        what="expands per-request sampling parameters to drafted tokens in the output tensor itself",
        why="the original writes into a converted copy: temperature, top_k and top_p of drafted rows are "
        "whatever the memory held",
        upstream=_lines("vllm/utils/cpu_triton_utils.py", 394, 390),
        expected=(
            Signature(
                "output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=None",
                "e3fc0cf56c7ff05c",
            ),
        ),
        platform="cpu",
        patch=KernelMend("_expand_kernel_impl", "expand_kernel", expand_in_place),
    ),
    Entry(
        name="cpu-reject-padding",
        target=f"{_CPU_KERNELS}:_rejection_random_sample_kernel_impl",
        what="rejects draft tokens below 0",
        why="the original accepts a padding of -1 with the probability that lies before the row in memory",
        upstream=_lines("vllm/utils/cpu_triton_utils.py", 350, 346),
        expected=(
            Signature(
                "output_token_ids, cu_num_draft_tokens, draft_token_ids, draft_probs, target_probs, "
                "bonus_token_ids, recovered_token_ids, uniform_probs, is_greedy, max_spec_len, vocab_size, "
                "synthetic_conditional_rates=None, NO_DRAFT_PROBS=False, SYNTHETIC_MODE=False",
                "75c6c9a885b12d1d",
            ),
        ),
        platform="cpu",
        patch=KernelMend("_rejection_random_sample_kernel_impl", "rejection_random_sample_kernel", reject_padding),
    ),
    Entry(
        name="cpu-recover-padding",
        target=f"{_CPU_KERNELS}:_sample_recovered_tokens_kernel_impl",
        what="draws the token in place of a padding from the target's distribution",
        why="the original subtracts the draft's probabilities although nothing was drafted there",
        upstream=_lines("vllm/utils/cpu_triton_utils.py", 411, 407),
        expected=(
            Signature(
                "output_token_ids, cu_num_draft_tokens, draft_token_ids, draft_probs, target_probs, inv_q, "
                "vocab_size, BLOCK_SIZE=None, NO_DRAFT_PROBS=False, USE_FP64_GUMBEL=False",
                "fa4183af5f709244",
            ),
        ),
        platform="cpu",
        patch=KernelMend(
            "_sample_recovered_tokens_kernel_impl",
            "sample_recovered_tokens_kernel",
            recover_padding_from_target,
        ),
    ),
)

HOOKS: tuple[Entry, ...] = (
    Entry(
        name="speculative-config",
        target="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        what='wrapped: builds our configuration when the method is "double"',
        why="the only place through which every front end's speculative configuration passes",
        upstream=_lines("vllm/engine/arg_utils.py", 2023, 2060),
        expected=(Signature("self, target_model_config, target_parallel_config"),),
    ),
    Entry(
        name="speculative-config-validation",
        target="vllm.config.speculative:SpeculativeConfig.__post_init__",
        what="called by our subclass after it has put the custom class in place of the draft model",
        why="derives the configuration that the scheduler and the workers read",
        upstream=_lines("vllm/config/speculative.py", 1115, 1121),
        expected=(Signature("self"),),
    ),
    Entry(
        name="propose",
        target=f"{_MODEL_RUNNER}:GPUModelRunner.propose_draft_token_ids",
        what="wrapped: hands the scheduler's output and the input batch to our proposer",
        why="custom proposers are called without request ids",
        upstream=_lines("vllm/v1/worker/gpu_model_runner.py", 4957, 4748),
        expected=(
            Signature(
                "self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, "
                "sample_hidden_states, aux_hidden_states, spec_decode_metadata, common_attn_metadata, "
                "slot_mappings"
            ),
        ),
    ),
    Entry(
        name="fits-in-drafter",
        target=f"{_MODEL_RUNNER}:GPUModelRunner._input_fits_in_drafter",
        what="wrapped: always true, chains are clipped row by row",
        why="one row close to the model's length takes the drafts of the whole batch away",
        upstream=_lines("vllm/v1/worker/gpu_model_runner.py", 4514, 4288),
        expected=(Signature("self, common_attn_metadata"),),
    ),
    Entry(
        name="update-states",
        target=f"{_MODEL_RUNNER}:GPUModelRunner._update_states",
        what="wrapped: sees finished requests",
        why="a last, empty step returns before anything is sampled",
        upstream=_lines("vllm/v1/worker/gpu_model_runner.py", 1192, 1172),
        expected=(Signature("self, scheduler_output"),),
    ),
    Entry(
        name="execute-model",
        target=f"{_MODEL_RUNNER}:GPUModelRunner.execute_model",
        what="wrapped: samples at once where there is no grammar to wait for",
        why="the engine core asks for the samples in a second round trip, while the target stands still",
        upstream=_lines("vllm/v1/worker/gpu_model_runner.py", 4149, 3940),
        expected=(Signature("self, scheduler_output, intermediate_tensors=None"),),
    ),
    Entry(
        name="sample-tokens",
        target=f"{_MODEL_RUNNER}:GPUModelRunner.sample_tokens",
        what="wrapped: its output carries the drafts",
        why="the engine core asks for the drafts in a third round trip",
        upstream=_lines("vllm/v1/worker/gpu_model_runner.py", 4530, 4304),
        expected=(Signature("self, grammar_output"),),
    ),
    Entry(
        name="worker-drafts",
        target=f"{_MODEL_RUNNER}:GPUModelRunner.take_draft_token_ids",
        what="called after sampling: the drafts that the output carries",
        why="what the engine core would get in the third round trip",
        upstream=_lines("vllm/v1/worker/gpu_model_runner.py", 4836, 4627),
        expected=(Signature("self"),),
    ),
    Entry(
        name="scheduler",
        target="vllm.v1.core.sched.scheduler:Scheduler.__init__",
        what="wrapped: a request that begins with one token gets no placeholders to verify",
        why="each would cost the target num_speculative_tokens query tokens that nobody proposed",
        upstream=_lines("vllm/v1/core/sched/scheduler.py", 80, 85),
        expected=(
            Signature(
                "self, vllm_config, kv_cache_config, structured_output_manager, block_size, hash_block_size=None, "
                "mm_registry=MULTIMODAL_REGISTRY, include_finished_set=False, log_stats=False"
            ),
        ),
    ),
    Entry(
        name="engine-core-output",
        target="vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        what="wrapped: keeps the drafts that the worker's output carries",
        why="the only place in the engine core through which every output passes",
        upstream=_lines("vllm/v1/core/sched/scheduler.py", 1967, 2026),
        expected=(Signature("self, scheduler_output, model_runner_output"),),
    ),
    Entry(
        name="engine-core-drafts",
        target="vllm.v1.executor.multiproc_executor:MultiprocExecutor.take_draft_token_ids",
        what="wrapped: returns the drafts that came with the output, and asks the worker where none did",
        why="saves the third round trip",
        upstream=_lines("vllm/v1/executor/multiproc_executor.py", 369, 374),
        expected=(Signature("self"),),
    ),
    Entry(
        name="new-request",
        target="vllm.v1.core.sched.output:NewRequestData.from_request",
        what="wrapped: carries the request's cache_salt, and the number of prefix cache resets, as attributes",
        why="history is kept per tenant, and the workers are told neither",
        upstream=_lines("vllm/v1/core/sched/output.py", 59, 59),
        expected=(Signature("cls, request, block_ids, prefill_token_ids=None, uses_mrope=False"),),
    ),
    Entry(
        name="prefix-cache-reset",
        target="vllm.v1.core.sched.scheduler:Scheduler.reset_prefix_cache",
        what="wrapped: counts the resets",
        why="the draft's prefix cache is to be cold when the target's is",
        upstream=_lines("vllm/v1/core/sched/scheduler.py", 2774, 2840),
        expected=(Signature("self, reset_running_requests=False, reset_connector=False"),),
    ),
    Entry(
        name="request-verification",
        target="vllm.sampling_params:SamplingParams._validate_spec_decode",
        what='wrapped: refuses a request whose extra_args["double"] cannot be read, and no min_p or logit_bias',
        why="the worker must not fail for one request's mistake; and both are applied behind each draft token",
        upstream=_lines("vllm/sampling_params.py", 1103, 1182),
        expected=(Signature("self, speculative_config"),),
    ),
    Entry(
        name="v2-supported",
        target="vllm.config.vllm:VllmConfig._get_v2_model_runner_unsupported_features",
        what="wrapped: method double is not among them",
        why="vLLM chooses its model runner by this list, and custom proposers are on it",
        upstream=_lines("vllm/config/vllm.py", 3051, 2914),
        expected=(Signature("self"),),
    ),
    Entry(
        name="v2-speculator",
        target="vllm.v1.worker.gpu.spec_decode:init_speculator",
        what="wrapped: builds our speculator",
        why="this is how the V2 runner comes to have it",
        upstream=_lines("vllm/v1/worker/gpu/spec_decode/__init__.py", 8, 13),
        expected=(Signature("vllm_config, device"), Signature("vllm_config, device, req_states")),
    ),
    Entry(
        name="v2-propose",
        target="vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.propose",
        what="implemented: gives what stands on the device until the next chains are written there",
        why="the V2 runner asks before what was sampled is known on the host",
        upstream=_lines("vllm/v1/worker/gpu/spec_decode/speculator.py", 73, 74),
        expected=tuple(
            Signature(
                "self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, "
                f"num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, {sync}=None, dummy_run=False, "
                f"skip_attn_for_dummy_run=False, mm_inputs=None, is_profile=False{last}"
            )
            for sync, last in (("dp_sync", ""), ("dp_sync_state", ", num_speculative_tokens=None"))
        ),
    ),
    Entry(
        name="v2-graphs",
        target="vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.init_cudagraph_manager",
        what="implemented: does nothing",
        why="the V2 runner asks its speculator to record graphs, and nothing of ours runs in the target's stream",
        upstream=_lines("vllm/v1/worker/gpu/spec_decode/speculator.py", 65, 66),
        expected=(Signature("self, cudagraph_mode"),),
    ),
    Entry(
        name="v2-capture",
        target="vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.capture",
        what="implemented: does nothing",
        why="as for v2-graphs",
        upstream=_lines("vllm/v1/worker/gpu/spec_decode/speculator.py", 69, 70),
        expected=(Signature("self"),),
    ),
    _v2(
        "v2-update-requests",
        "update_requests",
        (1196, 1236),
        "self, scheduler_output",
        "wrapped: sees requests that ended or are new, and writes what is to be verified to the device",
        "the speculator is told neither, and V2 reads drafts from the device",
    ),
    _v2(
        "v2-execute-model",
        "execute_model",
        (1676, 1719),
        "self, scheduler_output, intermediate_tensors=None, dummy_run=False, skip_attn_for_dummy_run=False, "
        "is_profile=False, context_len=0, valid_dummy_state_slots=False, randomize_inputs=False",
        "wrapped: samples at once where there is no grammar to wait for",
        "the engine core asks for the samples in a second round trip, while the target stands still",
    ),
    _v2(
        "v2-sample-tokens",
        "sample_tokens",
        (2050, 2088),
        "self, grammar_output",
        "wrapped: proposes, and its output carries the drafts",
        "the speculator is asked before what was sampled is known on the host",
    ),
    _v2(
        "v2-worker-drafts",
        "take_draft_token_ids",
        (2244, 2282),
        "self",
        "wrapped: tells the scheduler the real chains",
        "V2 tells it as many placeholders for every request, which the target would then verify",
    ),
    Entry(
        name="v2-output",
        target="vllm.v1.worker.gpu.async_utils:AsyncOutput.get_output",
        what="called after sampling: waits for what was sampled",
        why="chains are proposed behind it",
        upstream=_lines("vllm/v1/worker/gpu/async_utils.py", 173, 173),
        expected=(Signature("self"),),
    ),
    Entry(
        name="warm-up",
        target=f"{_WORKER}:Worker.compile_or_warm_up_model",
        what="wrapped: a draft on a GPU is started, and step times are learnt anew",
        why="the target measures how much memory is free before, and compiles in its first steps",
        upstream=_lines("vllm/v1/worker/gpu_worker.py", 829, 908),
        expected=(Signature("self"),),
    ),
    _weights("reload-weights", "reload_weights", (566, 629), "self, *args, **kwargs"),
    _weights("update-weights", "update_weights", (1486, 1550), "self, update_info"),
    _weights("finish-weight-update", "finish_weight_update", (1523, 1587), "self"),
    _weights("sleep", "sleep", (271, 294), "self, level=1", " at level 2, which gives the weights up"),
    _weights(
        "add-lora", "add_lora", (1384, 1439), "self, lora_request", " when an adapter is loaded in place of its former self"
    ),
    Entry(
        name="custom-proposer",
        target="vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer",
        what="relied upon: builds our proposer from its dotted path with the configuration alone",
        why="this is how the worker comes to have our proposer",
        upstream=_lines("vllm/v1/spec_decode/custom_class_proposer.py", 12, 12),
        expected=(Signature("vllm_config"),),
    ),
    Entry(
        name="engine-core-wait",
        target="vllm.distributed.device_communicators.shm_broadcast:SpinCondition.wait",
        what="wrapped: the engine core sleeps until its workers' answer is announced",
        why="it waits by sched_yield in a loop, which takes half of the draft's core",
        upstream=_lines("vllm/distributed/device_communicators/shm_broadcast.py", 190, 195),
        expected=(Signature("self, timeout_ms=None"),),
    ),
    Entry(
        name="observe-draft",
        target="vllm.v1.spec_decode.metrics:SpecDecodingStats.observe_draft",
        what="relied upon: counts drafted and accepted tokens, and stops the engine when more are accepted "
        "than num_speculative_tokens",
        why="bounds the length of our chains",
        upstream=_lines("vllm/v1/spec_decode/metrics.py", 41, 41),
        expected=(Signature("self, num_draft_tokens, num_accepted_tokens"),),
    ),
)

ENTRIES: tuple[Entry, ...] = MENDS + HOOKS + SAMPLING
"""Every entry; names and targets are unique (tested)."""
