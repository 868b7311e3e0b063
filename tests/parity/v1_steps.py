"""The V1 model runner's sampling of drafted chains, with the tensors that it would build for them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.parity.distribution import (
    MAX_CHAIN,
    PROMPT,
    VOCAB,
    Case,
    Rows,
    TokenModel,
    draft_and_score,
    scheduled_lengths,
)

__all__ = ["SharedNoise", "VllmsRejection"]

_MOST_ROWS = 4096


class VllmsRejection:
    """vLLM's sampler and rejection sampler, as other speculative methods have them. Draws from torch's generator."""

    def __init__(self, seed: int) -> None:
        from vllm.v1.sample.logits_processor import LogitsProcessors
        from vllm.v1.sample.rejection_sampler import RejectionSampler
        from vllm.v1.sample.sampler import Sampler

        torch.manual_seed(seed)
        self.rejection_sampler: Any = RejectionSampler(Sampler())
        self.sampler: Any = self.rejection_sampler.sampler
        self.processors = LogitsProcessors()

    def start(self, cases: Sequence[Case], rows: Rows) -> None:
        """See Stepper."""

    def step(self, model: TokenModel, cases: Sequence[Case], rows: Rows) -> None:
        """See Stepper."""
        last = rows.last_two()
        scheduled, real = scheduled_lengths(cases, rows.case, last)
        self._follow(cases, rows, scheduled)
        chain, logits = draft_and_score(model, last, scheduled, real)
        sampling = _sampling_metadata(cases, rows, scheduled, chain, self.processors)
        if scheduled.any():
            output = self.rejection_sampler(_metadata(scheduled, chain), None, logits, sampling)
        else:
            output = self.sampler(logits, sampling)
        rows.extend(output.sampled_token_ids.numpy())

    def _follow(self, cases: Sequence[Case], rows: Rows, scheduled: np.ndarray) -> None:
        """Before a forward."""


class SharedNoise(VllmsRejection):
    """What a worker with method double samples with. Each row has a seed."""

    def __init__(self, seed: int) -> None:
        from vllm.v1.sample.logits_processor import LogitsProcessors
        from vllm.v1.sample.sampler import Sampler

        from vllm_double.integration.v1_sampling import Draws, share_noise

        self._new_seeds = np.random.default_rng(seed)
        self._draws = Draws(*np.zeros((2, 0), np.int64))
        self._num_rows = 0
        runner = SimpleNamespace(
            sampler=Sampler(), rejection_sampler=None, device=torch.device("cpu"),
            vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=_MOST_ROWS)),
            input_batch=SimpleNamespace(logitsprocs=LogitsProcessors(), thinking_budget_state_holder=None),
        )  # fmt: skip
        share_noise(runner, lambda: self._draws)
        self.sampler, self.rejection_sampler = runner.sampler, runner.rejection_sampler
        self.processors = runner.input_batch.logitsprocs

    def start(self, cases: Sequence[Case], rows: Rows) -> None:
        """See Stepper."""
        from vllm.sampling_params import SamplingParams

        self._seeds = self._new_seeds.integers(-(1 << 63), 1 << 63, len(rows.case))
        self._params = [SamplingParams(min_p=case.rule.min_p, logit_bias=dict(case.rule.bias) or None) for case in cases]

    def _follow(self, cases: Sequence[Case], rows: Rows, scheduled: np.ndarray) -> None:
        from vllm.v1.sample.logits_processor.interface import BatchUpdate

        self._draws = self._draws._replace(
            seeds=self._seeds[rows.place], last_positions=len(PROMPT) - 1 + rows.lengths + scheduled
        )
        if not any(case.rule.min_p or case.rule.bias for case in cases):
            return
        num_rows = len(rows.case)
        added = [(row, self._params[case], None, []) for row, case in enumerate(rows.case)]
        update = BatchUpdate(num_rows, range(num_rows, self._num_rows), added, [])
        self._num_rows = num_rows
        for processor in self.processors.all:
            processor.update_state(update)


def _metadata(scheduled: np.ndarray, chain: np.ndarray, most: int = MAX_CHAIN) -> Any:
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    drafted = np.arange(most) < scheduled[:, None]
    ends = np.cumsum(scheduled + 1)
    all_logits = np.arange(ends[-1])
    bonus = ends - 1
    return SpecDecodeMetadata(
        draft_token_ids=torch.from_numpy(chain[drafted].astype(np.int32)),
        num_draft_tokens=scheduled.tolist(),
        cu_num_draft_tokens=torch.from_numpy(np.cumsum(scheduled).astype(np.int32)),
        cu_num_sampled_tokens=torch.from_numpy(ends.astype(np.int32)),
        target_logits_indices=torch.from_numpy(np.delete(all_logits, bonus).astype(np.int32)),
        bonus_logits_indices=torch.from_numpy(bonus.astype(np.int32)),
        logits_indices=torch.from_numpy(all_logits.astype(np.int32)),
    )


def _sampling_metadata(cases: Sequence[Case], rows: Rows, scheduled: np.ndarray, chain: np.ndarray, processors: Any) -> Any:
    from vllm.v1.sample.metadata import SamplingMetadata

    rules = [case.rule for case in cases]

    def column(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([getattr(rule, name) for rule in rules], dtype=dtype)[torch.from_numpy(rows.case)]

    penalises = any(rule.penalises for rule in rules)
    temperature = column("temperature")
    drafts = None
    if penalises:
        drafts = [row[:length] for row, length in zip(chain.tolist(), scheduled.tolist(), strict=True)]
    return SamplingMetadata(
        temperature=temperature,
        all_greedy=False,
        all_random=bool((temperature > 0).all()),
        top_p=column("top_p") if any(rule.top_p < 1 for rule in rules) else None,
        top_k=column("top_k", torch.int32) if any(rule.top_k < VOCAB for rule in rules) else None,
        generators={},
        max_num_logprobs=None,
        no_penalties=not penalises,
        prompt_token_ids=torch.tensor([PROMPT] * len(rows.case)) if penalises else None,
        frequency_penalties=column("frequency"),
        presence_penalties=column("presence"),
        repetition_penalties=column("repetition"),
        output_token_ids=rows.outputs() if penalises else [],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=processors,
        spec_token_ids=drafts,
    )
