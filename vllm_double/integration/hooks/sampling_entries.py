"""The part of the table that is about sampling with shared noise; see `entries`."""

from __future__ import annotations

from vllm_double.integration.hooks.registry import Entry, Signature

_V1_SAMPLER = "vllm.v1.sample.sampler:Sampler"
_V1_REJECTION = "vllm.v1.sample.rejection_sampler:RejectionSampler"
_TOP_K_TOP_P = "vllm.v1.sample.ops.topk_topp_sampler"
_PROCESSORS = "vllm.v1.sample.logits_processor"
_BUDGET = "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder"
_V2_SAMPLER = "vllm.v1.worker.gpu.sample"

_V2_ROWS = "expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids, expanded_local_pos, seq_lens_upper_bound_np"
_V2_VERIFY = (
    "self, logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, idx_mapping_np, expanded_idx_mapping, "
    "expanded_local_pos, seq_lens_upper_bound_np"
)
_V2_GUMBEL = (
    "logits, expanded_idx_mapping, temperature, seed, pos, apply_temperature, is_drafting, logits_cache=None, "
    "logits_cache_col=None, use_fp64=False"
)
_ROWWISE = "knows requests, and is applied to the rows behind draft tokens"


def _entry(name: str, target: str, lines: tuple[int, int], what: str, why: str, *signatures: str) -> Entry:
    path = target.partition(":")[0].replace(".", "/") + ".py"
    upstream = {"0.31": f"{path}:{lines[0]}", "0.32": f"{path}:{lines[1]}"}
    return Entry(name, target, what, why, upstream, tuple(map(Signature, signatures)))


SAMPLING: tuple[Entry, ...] = (
    _entry(
        "v1-sampler",
        f"{_V1_SAMPLER}.__init__",
        (61, 62),
        "relied upon: topk_topp_sampler and logprobs_mode are attributes",
        "the first is replaced on the runner's own sampler",
        "self, logprobs_mode='raw_logprobs', use_fp64_gumbel=False",
    ),
    _entry(
        "v1-sampler-forward",
        f"{_V1_SAMPLER}.forward",
        (72, 73),
        "called for all rows of a verification at once",
        "each row is drawn as if the draft tokens in front of it had been committed",
        "self, logits, sampling_metadata, predict_bonus_token=False, logprobs_mode_override=None",
    ),
    _entry(
        "v1-sample",
        f"{_V1_SAMPLER}.sample",
        (244, 247),
        "relied upon: applies the temperature and argmax-invariant processors, and calls topk_topp_sampler",
        "noise is added to what it hands over",
        "self, logits, sampling_metadata, logprobs_mode_override=None",
    ),
    _entry(
        "v1-logits-processors",
        f"{_V1_SAMPLER}.apply_logits_processors",
        (372, 375),
        "relied upon: reads from the metadata only what is expanded to rows",
        "another field would still be by request",
        "self, logits, sampling_metadata, predict_bonus_token",
    ),
    _entry(
        "v1-draw",
        f"{_TOP_K_TOP_P}:TopKTopPSampler.forward_native",
        (263, 263),
        "replaced on the runner's own sampler: draws with shared noise",
        "vLLM's draws depend on the order of the batch, and the draft cannot know them",
        "self, logits, generators, k, p",
    ),
    _entry(
        "v1-filters",
        f"{_TOP_K_TOP_P}:apply_top_k_top_p",
        (449, 460),
        "called before a draw",
        "shared noise is added to what top_k and top_p leave",
        "logits, k, p",
    ),
    _entry(
        "v1-verification",
        f"{_V1_REJECTION}.forward",
        (106, 106),
        "replaced on the runner: accepts a draft token if it is what is drawn",
        "with shared noise a ratio of probabilities would bias the text",
        "self, metadata, draft_probs, logits, sampling_metadata",
    ),
    _entry(
        "v1-verified",
        f"{_V1_REJECTION}.parse_output",
        (268, 268),
        "called by the runner for what ours has sampled",
        "the form of the output is vLLM's",
        "output_token_ids, vocab_size, discard_req_indices=(), logprobs_tensors=None",
    ),
    _entry(
        "v1-runner-samples",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
        (3636, 3437),
        "relied upon: samples with the runner's sampler and rejection_sampler",
        "these are replaced",
        "self, logits, spec_decode_metadata",
    ),
    _entry(
        "v1-processors",
        f"{_PROCESSORS}.state:LogitsProcessors.__init__",
        (153, 153),
        "relied upon: lists argmax_invariant and non_argmax_invariant processors",
        "min_p and logit_bias, which vLLM leaves out under speculation, are added there",
        "self, logitsprocs=None",
    ),
    _entry(
        "v1-min-tokens",
        f"{_PROCESSORS}.builtin:MinTokensLogitsProcessor.apply_with_spec_decode",
        (290, 290),
        "called with the rows of each request",
        _ROWWISE,
        "self, logits, num_draft_tokens",
    ),
    _entry(
        "v1-min-p-init",
        f"{_PROCESSORS}.builtin:MinPLogitsProcessor.__init__",
        (24, 24),
        "called: the processor that vLLM leaves out under speculation",
        "requests with min_p are served",
        "self, vllm_config, device, is_pin_memory",
    ),
    _entry(
        "v1-min-p",
        f"{_PROCESSORS}.builtin:MinPLogitsProcessor.apply",
        (102, 102),
        "called while its attribute min_p is that of the rows",
        _ROWWISE,
        "self, logits",
    ),
    _entry(
        "v1-logit-bias-init",
        f"{_PROCESSORS}.builtin:LogitBiasLogitsProcessor.__init__",
        (120, 120),
        "called: the processor that vLLM leaves out under speculation",
        "requests with logit_bias are served",
        "self, _, device, is_pin_memory",
    ),
    _entry(
        "v1-logit-bias",
        f"{_PROCESSORS}.builtin:LogitBiasLogitsProcessor.update_state",
        (135, 135),
        "relied upon: its attribute biases has the biases of each request",
        _ROWWISE,
        "self, batch_update",
    ),
    _entry(
        "v1-thinking-budget",
        f"{_BUDGET}.update_state",
        (114, 114),
        "called with outputs and drafts by request",
        "the sampler would call it with those of rows",
        "self, output_token_ids, spec_token_ids, repeat_indices=None",
    ),
    _entry(
        "v1-thinking-budget-rows",
        f"{_BUDGET}.apply_to_logits",
        (150, 150),
        "called for the rows before the last of each request, and for the last ones",
        "it takes them apart",
        "self, logits, predict_bonus_token, spec_token_ids",
    ),
    _entry(
        "v2-verification",
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler._verify",
        (237, 244),
        "replaced on the runner's own: accepts a draft token if it is what is drawn",
        "with shared noise a ratio of probabilities would bias the text",
        _V2_VERIFY,
        f"{_V2_VERIFY}, verify_draft_sampled",
    ),
    _entry(
        "v2-draw",
        f"{_V2_SAMPLER}.gumbel:gumbel_sample",
        (326, 336),
        "called for all rows of a verification",
        "its noise is the one that is shared",
        _V2_GUMBEL,
        f"{_V2_GUMBEL}, logits_cache_source=None",
    ),
    _entry(
        "v2-sampling-params",
        f"{_V2_SAMPLER}.sampler:Sampler.apply_sampling_params",
        (223, 226),
        "called for all rows of a verification",
        "shared noise is added to what it leaves",
        f"self, logits, {_V2_ROWS}, skip_top_k_top_p=False",
    ),
    _entry(
        "v2-sample",
        f"{_V2_SAMPLER}.sampler:Sampler.sample",
        (275, 278),
        "relied upon: draws rows without drafts with gumbel_sample unless use_flashinfer or use_xpu_sampler is set",
        "those draw with noise of their own, and are switched off",
        f"self, logits, {_V2_ROWS}, return_logprobs=False",
    ),
    _entry(
        "v2-seeds",
        f"{_V2_SAMPLER}.states:SamplingStates.add_request",
        (41, 41),
        "relied upon: puts the request's seed, or one of its own, into seeds",
        "the draft ranks its tokens by the noise of that seed",
        "self, req_idx, sampling_params",
    ),
)
