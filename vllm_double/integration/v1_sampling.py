"""Sampling with shared noise on vLLM's V1 model runner: what its sampler and its rejection sampler are replaced by.

A token is drawn as the argmax of ``logits + noise(seed, position, token)``, and a draft token is accepted if it is the token
that is drawn at its position (Gumbel coupling, Daliri et al., arXiv 2408.07978). So a text is a function of prompt, parameters
and seed, with drafts and without, and the draft worker can rank its tokens by the same noise.

A row of logits with draft tokens in front of it is treated as if these had been committed: the metadata of the batch is
expanded to one row per position, and vLLM's own sampler does the rest. Everything happens on the logits' device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from double_kernels import sample_with_noise
from torch import nn
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

__all__ = ["ChainVerifier", "Draws", "RowwiseBudget", "SharedNoiseSampler", "share_noise"]


class Draws(NamedTuple):
    """Where the draws of a batch lie in their requests' noise: int64 [requests] each.

    last_positions: of the last token that the forward reads for each request, draft tokens included.
    """

    seeds: npt.NDArray[np.int64]
    last_positions: npt.NDArray[np.int64]


def share_noise(runner: Any, draws_of: Callable[[], Draws]) -> None:
    """Have the runner draw with shared noise, and apply `min_p` and `logit_bias`, which vLLM leaves out under speculation.

    draws_of: of the batch that is being sampled.
    """
    if runner.device.type == "cpu":
        from double_kernels.ranking import compiled_ranking  # numba, which must not be there before vLLM's kernels

        compiled_ranking()  # now, and not in somebody's request
    sampler = runner.sampler
    sampler.topk_topp_sampler = SharedNoiseSampler(sampler.logprobs_mode, draws_of)
    runner.rejection_sampler = ChainVerifier(sampler)
    processors = runner.input_batch.logitsprocs
    present = {type(processor) for processor in processors.all}
    for kind in (MinPLogitsProcessor, LogitBiasLogitsProcessor):
        if kind not in present:
            processor = kind(runner.vllm_config, runner.device, runner.device.type != "cpu")
            invariant = processor.is_argmax_invariant()
            (processors.argmax_invariant if invariant else processors.non_argmax_invariant).append(processor)
    if runner.input_batch.thinking_budget_state_holder is not None:
        runner.input_batch.thinking_budget_state_holder = RowwiseBudget(runner.vllm_config.reasoning_config, runner.device)


class SharedNoiseSampler(nn.Module):
    """In place of vLLM's TopKTopPSampler: the same filters, and draws with shared noise."""

    def __init__(self, logprobs_mode: str, draws_of: Callable[[], Draws]) -> None:
        super().__init__()
        self.logprobs_mode = logprobs_mode
        self._draws_of = draws_of
        self._expansion: _Expansion | None = None  # while rows behind draft tokens are sampled

    def expand(self, expansion: _Expansion | None) -> None:
        """From now on rows are positions of requests; None: they are requests."""
        self._expansion = expansion

    def forward(
        self, logits: torch.Tensor, generators: Any, k: torch.Tensor | None, p: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See TopKTopPSampler.forward_native: int64 [rows], and processed logits or log-probabilities if they are wanted."""
        logits = apply_top_k_top_p(logits, k, p)
        processed = None
        if self.logprobs_mode == "processed_logits":
            processed = logits
        elif self.logprobs_mode == "processed_logprobs":
            processed = logits.log_softmax(dim=-1, dtype=torch.float32)
        draws = self._draws_of()
        seeds, positions = draws.seeds, draws.last_positions
        if self._expansion is not None:
            seeds, positions = seeds[self._expansion.owners], self._expansion.positions(positions)
        device = logits.device
        seeds_there, positions_there = (torch.from_numpy(array).to(device, non_blocking=True) for array in (seeds, positions))
        return sample_with_noise(logits, seeds_there, positions_there), processed


class ChainVerifier(nn.Module):
    """In place of vLLM's RejectionSampler: draft tokens are accepted up to the first that differs from what is drawn there."""

    parse_output = staticmethod(RejectionSampler.parse_output)

    def __init__(self, sampler: nn.Module) -> None:
        """sampler: vLLM's, whose ``topk_topp_sampler`` is a SharedNoiseSampler."""
        super().__init__()
        self.sampler: Any = sampler

    def forward(
        self, metadata: SpecDecodeMetadata, draft_probs: Any, logits: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> SamplerOutput:
        """See RejectionSampler.forward. logits: [draft tokens + requests, vocabulary], changed in place.

        sampled_token_ids: int32 [requests, longest chain + 1], PLACEHOLDER_TOKEN_ID behind the accepted tokens and the one
        that was drawn behind them.
        """
        expansion = _Expansion(metadata.num_draft_tokens)
        self.sampler.topk_topp_sampler.expand(expansion)
        try:
            drawn = self.sampler(logits=logits, sampling_metadata=expansion.expand(sampling_metadata, metadata))
        finally:
            self.sampler.topk_topp_sampler.expand(None)
        tokens = drawn.sampled_token_ids.view(-1)
        device = tokens.device
        counts = torch.tensor(metadata.num_draft_tokens, device=device).unsqueeze(1)
        places = torch.arange(metadata.max_spec_len + 1, device=device)
        starts = metadata.cu_num_sampled_tokens.unsqueeze(1) - counts - 1
        rows = torch.minimum(starts + places, starts + counts)  # [requests, longest chain + 1]
        padded = tokens[rows]
        before = metadata.cu_num_draft_tokens.unsqueeze(1) - counts
        drafts = metadata.draft_token_ids[(before + places[:-1]).clamp_(max=len(metadata.draft_token_ids) - 1)]
        is_accepted = (padded[:, :-1] == drafts) & (places[:-1] < counts)
        num_accepted = is_accepted.cumprod(dim=1).sum(dim=1, keepdim=True)
        padded[places > num_accepted] = PLACEHOLDER_TOKEN_ID
        logprobs = drawn.logprobs_tensors
        if logprobs is not None:
            flat = rows.flatten()
            logprobs = LogprobsTensors(
                logprobs.logprob_token_ids[flat], logprobs.logprobs[flat], logprobs.selected_token_ranks[flat]
            )
        return SamplerOutput(sampled_token_ids=padded, logprobs_tensors=logprobs)


class _Expansion:
    """From requests to the rows of a verification: of each request one row per draft token, and one behind them.

    owners: int64 [rows], the request of each row. depths: int64 [rows], draft tokens in front of it.
    """

    def __init__(self, num_draft_tokens: Sequence[int]) -> None:
        self.counts = np.asarray(num_draft_tokens, dtype=np.int64)
        self.owners = np.repeat(np.arange(len(self.counts)), self.counts + 1)
        self._ends = np.cumsum(self.counts + 1)
        self.depths = np.arange(len(self.owners)) - (self._ends - self.counts - 1)[self.owners]

    def positions(self, last_positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64 [rows], of the token that each row's logits are behind."""
        return last_positions[self.owners] - (self.counts[self.owners] - self.depths)

    def rows_of(self, request: int) -> range:
        """The rows of a request."""
        end = int(self._ends[request])
        return range(end - int(self.counts[request]) - 1, end)

    def expand(self, batch: SamplingMetadata, metadata: SpecDecodeMetadata) -> SamplingMetadata:
        """The sampling metadata of the rows."""
        owners = torch.from_numpy(self.owners).to(metadata.logits_indices.device, non_blocking=True)
        budget: Any = batch.thinking_budget_state_holder

        def rows(values: Any) -> Any:
            return None if values is None else values[owners]

        return replace(
            batch,
            temperature=rows(batch.temperature),
            top_p=rows(batch.top_p),
            top_k=rows(batch.top_k),
            generators={},
            prompt_token_ids=None if batch.no_penalties else rows(batch.prompt_token_ids),
            frequency_penalties=rows(batch.frequency_penalties),
            presence_penalties=rows(batch.presence_penalties),
            repetition_penalties=rows(batch.repetition_penalties),
            output_token_ids=self._outputs(batch),
            allowed_token_ids_mask=rows(batch.allowed_token_ids_mask),
            bad_words_token_ids=self._by_row(batch.bad_words_token_ids),
            logitsprocs=self._processors(batch.logitsprocs),
            logprob_token_ids=self._by_row(batch.logprob_token_ids) if batch.logprob_token_ids else batch.logprob_token_ids,
            spec_token_ids=None,
            thinking_budget_state_holder=_ExpandedBudget(budget, self, batch) if budget is not None else None,
        )

    def _by_row(self, values: dict[int, Any]) -> dict[int, Any]:
        return {row: value for request, value in values.items() for row in self.rows_of(request)}

    def _outputs(self, batch: SamplingMetadata) -> list[list[int]]:
        """What each row's text has put out, with the draft tokens in front of it; nothing if nobody asks for it."""
        if not batch.output_token_ids:
            return []
        drafts = batch.spec_token_ids or [[]] * len(self.counts)
        return [
            batch.output_token_ids[owner] + list(drafts[owner][:depth]) if depth else batch.output_token_ids[owner]
            for owner, depth in zip(self.owners.tolist(), self.depths.tolist(), strict=True)
        ]

    def _processors(self, processors: LogitsProcessors) -> LogitsProcessors:
        """vLLM's built-in processors, which know requests, for rows; there are no others under speculative decoding."""
        expanded = LogitsProcessors()
        expanded.argmax_invariant = [_Rowwise(self, processor) for processor in processors.argmax_invariant]
        expanded.non_argmax_invariant = [_Rowwise(self, processor) for processor in processors.non_argmax_invariant]
        return expanded


class _Rowwise:
    """One of vLLM's processors, applied to the rows of an expansion."""

    def __init__(self, expansion: _Expansion, processor: Any) -> None:
        self._expansion = expansion
        self._processor = processor

    def apply(self, logits: torch.Tensor) -> Any:
        """See LogitsProcessor.apply: float32 [rows, vocabulary], changed in place."""
        expansion, processor = self._expansion, self._processor
        if isinstance(processor, MinTokensLogitsProcessor):
            return processor.apply_with_spec_decode(logits, (expansion.counts + 1).tolist())
        if isinstance(processor, LogitBiasLogitsProcessor):
            for request, biases in processor.biases.items():
                tokens = torch.tensor(list(biases), device=logits.device)
                amounts = torch.tensor(list(biases.values()), dtype=torch.float32, device=logits.device)
                rows = expansion.rows_of(request)
                logits[rows.start : rows.stop, tokens] += amounts
            return logits
        if isinstance(processor, MinPLogitsProcessor):
            if processor.min_p_count:
                by_request = processor.min_p
                processor.min_p = by_request[torch.from_numpy(expansion.owners).to(by_request.device)]
                try:
                    return processor.apply(logits)
                finally:
                    processor.min_p = by_request
            return logits
        raise TypeError(f"{type(processor).__name__} is no logits processor that knows draft tokens")


class RowwiseBudget(ThinkingBudgetStateHolder):
    """vLLM's thinking budget as it is without draft tokens: its states see a text token by token, and force the next one.

    vLLM's own runs ahead of the text by what is drafted, and forces the first row's token in steps without any.
    """

    _state: dict[int, dict[str, Any]]

    def __init__(self, reasoning_config: Any, device: torch.device) -> None:
        super().__init__(reasoning_config, 0, 0, device, False)
        self._mask_capacity = sys.maxsize  # any number of rows

    def sync_batch(self, batch_update: BatchUpdate | None) -> None:
        """See ThinkingBudgetStateHolder, which leaves a request that takes a finished one's place with that one's state."""
        for _, place, direction in batch_update.moved if batch_update else ():
            if direction is MoveDirectionality.UNIDIRECTIONAL:
                self._state.pop(place, None)
        super().sync_batch(batch_update)

    def update_state(self, output_token_ids: Any, *_: Any, **__: Any) -> None:
        """Have the requests' states see what was committed since the last step."""
        for request, state in self._state.items():
            outputs = output_token_ids[request]
            num_seen = state.get("num_seen", len(outputs))  # all at once if it comes with a text, after a preemption
            for end in range(min(num_seen + 1, len(outputs)), len(outputs) + 1):
                self._see(state, outputs[:end])
            state["num_seen"] = len(outputs)

    def _see(self, state: dict[str, Any], outputs: list[int]) -> None:
        state |= {"output_tok_ids": outputs, "spec_token_ids": [], "force_index": []}
        self._update_think_state(state)

    def apply_to_rows(self, logits: torch.Tensor, expansion: _Expansion, drafts: Sequence[Sequence[int]]) -> torch.Tensor:
        """As `apply_to_logits`, for the rows of an expansion. drafts: of each request."""
        requests, self._state = self._state, {}
        try:
            for request, state in requests.items():
                for depth, row in enumerate(expansion.rows_of(request)):
                    if depth:
                        state = state | {}
                        self._see(state, state["output_tok_ids"] + [drafts[request][depth - 1]])
                    self._state[row] = state
            forced: torch.Tensor = self.apply_to_logits(logits, False, None)
            return forced
        finally:
            self._state = requests


class _ExpandedBudget:
    """A thinking budget in the sampling metadata of an expansion."""

    def __init__(self, budget: RowwiseBudget, expansion: _Expansion, batch: SamplingMetadata) -> None:
        self._budget, self._expansion, self._batch = budget, expansion, batch
        self.has_tracked_requests = budget.has_tracked_requests

    def update_state(self, *_: Any, **__: Any) -> None:
        self._budget.update_state(self._batch.output_token_ids)

    def apply_to_logits(self, logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self._budget.apply_to_rows(logits, self._expansion, self._batch.spec_token_ids or [])
