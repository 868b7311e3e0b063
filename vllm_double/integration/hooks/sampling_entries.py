"""The part of the table that is about sampling with shared noise; see `entries`."""

from __future__ import annotations

from vllm_double.integration.hooks.registry import Entry, Names

__all__ = ["SAMPLING"]

_V1 = "vllm.v1.sample.sampler:Sampler"
_REJECTION = "vllm.v1.sample.rejection_sampler:RejectionSampler"
_FILTERS = "vllm.v1.sample.ops.topk_topp_sampler"
_PROCESSORS = "vllm.v1.sample.logits_processor"
_BUDGET = "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder"
_V2 = "vllm.v1.worker.gpu.sample"
_V2_ROWS = "expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids, expanded_local_pos, seq_lens_upper_bound_np"
_V2_VERIFIED = "idx_mapping, idx_mapping_np, expanded_idx_mapping, expanded_local_pos, seq_lens_upper_bound_np"

_NOISE = "vLLM accepts a draft token if it is what the target draws there (shared noise)"
_BY_ROW = "vLLM applies its logits processors behind each draft token"
_BUDGETS = "vLLM's own runs ahead of the text, and forces tokens of the wrong row in steps without drafts"
_ROWWISE = "knows requests, and is applied to the rows behind draft tokens"

# fmt: off
SAMPLING: tuple[Entry | Names, ...] = (
    *(
        Entry(target, parameters, what, why, _NOISE)
        for target, parameters, what, why in (
            (f"{_V1}.__init__", "self, logprobs_mode='raw_logprobs', ...",
                "relied upon: topk_topp_sampler and logprobs_mode are attributes",
                "the first is replaced on the runner's own sampler"),
            (f"{_V1}.forward", "self, logits, sampling_metadata, predict_bonus_token=False, logprobs_mode_override=None",
                "called for all rows of a verification at once",
                "each row is drawn as if the draft tokens in front of it had been committed"),
            (f"{_V1}.sample", "self, logits, sampling_metadata, logprobs_mode_override=None",
                "relied upon: applies the temperature and argmax-invariant processors, and calls topk_topp_sampler",
                "noise is added to what it hands over"),
            (f"{_FILTERS}:TopKTopPSampler.forward_native", "self, logits, generators, k, p",
                "replaced on the runner's own sampler: draws with shared noise",
                "vLLM's draws depend on the order of the batch, and the draft cannot know them"),
            (f"{_FILTERS}:apply_top_k_top_p", "logits, k, p", "called before a draw", "noise is added to what they leave"),
            (f"{_REJECTION}.forward", "self, metadata, draft_probs, logits, sampling_metadata",
                "replaced on the runner: accepts a draft token if it is what is drawn",
                "with shared noise a ratio of probabilities would bias the text"),
            (f"{_REJECTION}.parse_output", "output_token_ids, vocab_size, discard_req_indices=(), logprobs_tensors=None",
                "called by the runner for what ours has sampled", "the form of the output is vLLM's"),
            ("vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample", "self, logits, spec_decode_metadata",
                "relied upon: samples with the runner's sampler and rejection_sampler", "these are replaced"),
            ("vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler._verify",
                f"self, logits, draft_logits, draft_sampled, pos, cu_num_logits, {_V2_VERIFIED}, ...",
                "replaced on the runner's own: accepts a draft token if it is what is drawn",
                "with shared noise a ratio of probabilities would bias the text"),
            (f"{_V2}.gumbel:gumbel_sample",
                "logits, expanded_idx_mapping, temperature, seed, pos, apply_temperature, is_drafting, ...",
                "called for all rows of a verification", "its noise is the one that is shared"),
            (f"{_V2}.sampler:Sampler.apply_sampling_params", f"self, logits, {_V2_ROWS}, skip_top_k_top_p=False",
                "called for all rows of a verification", "shared noise is added to what it leaves"),
            (f"{_V2}.sampler:Sampler.sample", f"self, logits, {_V2_ROWS}, return_logprobs=False",
                "relied upon: draws rows without drafts with gumbel_sample unless use_flashinfer or use_xpu_sampler is set",
                "those draw with noise of their own, and are switched off"),
            (f"{_V2}.states:SamplingStates.add_request", "self, req_idx, sampling_params",
                "relied upon: puts the request's seed, or one of its own, into seeds",
                "the draft ranks its tokens by the noise of that seed"),
        )
    ),
    *(
        Entry(target, parameters, what, why, _BY_ROW)
        for target, parameters, what, why in (
            (f"{_V1}.apply_logits_processors", "self, logits, sampling_metadata, predict_bonus_token",
                "relied upon: reads from the metadata only what is expanded to rows",
                "another field would still be by request"),
            (f"{_PROCESSORS}.state:LogitsProcessors.__init__", "self, logitsprocs=None",
                "relied upon: lists argmax_invariant and non_argmax_invariant processors",
                "min_p and logit_bias, which vLLM leaves out under speculation, are added there"),
            (f"{_PROCESSORS}.builtin:MinTokensLogitsProcessor.apply_with_spec_decode", "self, logits, num_draft_tokens",
                "called with the rows of each request", _ROWWISE),
            (f"{_PROCESSORS}.builtin:MinPLogitsProcessor.__init__", "self, vllm_config, device, is_pin_memory",
                "called: the processor that vLLM leaves out under speculation", "requests with min_p are served"),
            (f"{_PROCESSORS}.builtin:MinPLogitsProcessor.apply", "self, logits",
                "called while its attribute min_p is that of the rows", _ROWWISE),
            (f"{_PROCESSORS}.builtin:LogitBiasLogitsProcessor.__init__", "self, _, device, is_pin_memory",
                "called: the processor that vLLM leaves out under speculation", "requests with logit_bias are served"),
            (f"{_PROCESSORS}.builtin:LogitBiasLogitsProcessor.update_state", "self, batch_update",
                "relied upon: its attribute biases has the biases of each request", _ROWWISE),
            (f"{_BUDGET}.__init__", "self, reasoning_config, max_num_seqs, num_spec_tokens, device, is_pin_memory",
                "a subclass takes the place of the runner's own, as if there were no draft tokens", _BUDGETS),
            (f"{_BUDGET}.sync_batch", "self, batch_update", "overridden: who takes a finished request's place begins anew",
                "a budget passes from one request to the next"),
            (f"{_BUDGET}.update_state", "self, output_token_ids, spec_token_ids, repeat_indices=None",
                "overridden: sees texts token by token", _BUDGETS),
            (f"{_BUDGET}._update_think_state", "self, state", "called for each token of a text, and behind each draft token",
                _BUDGETS),
            (f"{_BUDGET}.apply_to_logits", "self, logits, predict_bonus_token, spec_token_ids",
                "called while the states are those of rows", _ROWWISE),
        )
    ),
    Names(_BUDGET, "has_tracked_requests _mask_capacity _state"),
    Names("vllm.v1.worker.gpu_input_batch:InputBatch", "thinking_budget_state_holder"),
    Names(f"{_PROCESSORS}.interface", "BatchUpdate MoveDirectionality"),
    Names("vllm.v1.sample.thinking_budget_state", "ThinkingBudgetStateHolder"),
    Names("vllm.v1.sample.metadata:SamplingMetadata",
        "allowed_token_ids_mask bad_words_token_ids frequency_penalties generators logitsprocs logprob_token_ids "
        "no_penalties "
        "output_token_ids presence_penalties prompt_token_ids repetition_penalties spec_token_ids temperature "
        "thinking_budget_state_holder top_k top_p"),
    Names("vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
        "bonus_logits_indices cu_num_draft_tokens cu_num_sampled_tokens draft_token_ids logits_indices max_spec_len "
        "num_draft_tokens "
        "target_logits_indices"),
    Names(f"{_V2}.sampler:Sampler", "sampling_states use_flashinfer use_fp64_gumbel use_xpu_sampler"),
    Names(f"{_V2}.states:SamplingStates", "seeds temperature"),
)
