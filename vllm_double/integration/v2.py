"""The adapter to vLLM's V2 model runner.

V2 keeps texts on the device, lets a speculator write drafts there, and tells the scheduler only how many there are: as many
for every request. Here the scheduler is told the real, ragged chains, and what it schedules is written to the device before the
next forward, on every rank: rows without drafts cost no query token, and a chain that the scheduler cut is what is verified.

Four methods of our own runner are replaced. Its rejection sampler accepts the draft tokens that vLLM's sampler draws itself
(shared noise, see ``v1_sampling``).
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_double.integration.engine_core import DRAFTS_ATTRIBUTE, attach
from vllm_double.integration.rank import TargetRank
from vllm_double.target.batch import Batch
from vllm_double.wrap import wrap_once

__all__ = ["DoubleSpeculator"]


class _Texts:
    """The tokens of live requests on the host, where the V2 runner keeps none. ``buffer``: int32 [rows, tokens]."""

    def __init__(self) -> None:
        self.buffer = np.zeros((8, 1024), np.int32)
        self.rows: dict[str, int] = {}
        self.lengths = np.zeros(8, np.int32)
        self._free = list(range(8))

    def start(self, request_id: str, tokens: Sequence[int]) -> None:
        """A request enters, or its text is another one."""
        if request_id not in self.rows:
            if not self._free:
                self._free = list(range(len(self.buffer), 2 * len(self.buffer)))
                self._reserve(2 * len(self.buffer), 0)
            self.rows[request_id] = self._free.pop()
        self.lengths[self.rows[request_id]] = 0
        self.extend(request_id, tokens)

    def stop(self, request_id: str) -> None:
        """A request leaves; unknown ids are ignored."""
        if request_id in self.rows:
            self._free.append(self.rows.pop(request_id))

    def extend(self, request_id: str, tokens: Sequence[int]) -> None:
        """Its text goes on; unknown ids are ignored."""
        row = self.rows.get(request_id)
        if row is None:
            return
        start = int(self.lengths[row])
        end = start + len(tokens)
        if end > self.buffer.shape[1]:
            self._reserve(len(self.buffer), 1 << end.bit_length())
        self.buffer[row, start:end] = tokens
        self.lengths[row] = end

    def tokens(self, request_id: str) -> npt.NDArray[np.int32]:
        """int32 [n], a view that is good until a text begins or goes on."""
        row = self.rows[request_id]
        return self.buffer[row, : self.lengths[row]]

    def _reserve(self, num_rows: int, num_tokens: int) -> None:
        """What is not written yet takes no memory."""
        buffer, lengths = np.zeros((num_rows, max(num_tokens, self.buffer.shape[1])), np.int32), np.zeros(num_rows, np.int32)
        lengths[: len(self.lengths)] = self.lengths
        for row in self.rows.values():
            if row < len(self.buffer):
                buffer[row, : lengths[row]] = self.buffer[row, : lengths[row]]
        self.buffer, self.lengths = buffer, lengths


class DoubleSpeculator(TargetRank, BaseSpeculator):
    """What the wrapped ``init_speculator`` builds in each target worker."""

    supports_mm_inputs = False
    draft_logits = None  # no probabilities are compared

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config)
        self._num_tokens = vllm_config.speculative_config.num_speculative_tokens
        self._device = device
        self._texts = _Texts()  # on the output rank
        self._step: Any = None  # the scheduler's output of the step that is being computed
        self._drafts: DraftTokenIds | None = None
        self._seeds: dict[str, int] = {}  # of live requests, on the output rank

    def join(self, worker: Any) -> None:
        super().join(worker)
        runner = worker.model_runner
        share_noise(runner)

        @wrap_once(runner, "update_requests")
        def update_requests(original: Any, scheduler_output: Any) -> Any:
            result = original(scheduler_output)
            self.follow_step(runner, scheduler_output)
            return result

        @wrap_once(runner, "execute_model")
        def execute_model(original: Any, scheduler_output: Any, *args: Any, dummy_run: bool = False, **kwargs: Any) -> Any:
            output = original(scheduler_output, *args, dummy_run=dummy_run, **kwargs)
            if output is not None or dummy_run or scheduler_output.has_structured_output_requests:
                return output  # nothing to sample, or the engine core still makes the grammar's bitmask
            return runner.sample_tokens(None)

        @wrap_once(runner, "sample_tokens")
        def sample_tokens(original: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if not isinstance(output, AsyncOutput):
                return output
            # Scheduling is synchronous: the engine core waits for this output, whoever makes it.
            output = output.get_output()
            attach(output, DRAFTS_ATTRIBUTE, self.propose_rows(output))
            return output

        @wrap_once(runner, "take_draft_token_ids")
        def take_draft_token_ids(original: Any) -> Any:
            return self.take_drafts()

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """See BaseSpeculator: nothing of ours runs in the target's stream."""

    def capture(self) -> None:
        """See BaseSpeculator."""

    def propose(self, input_batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """int64 [requests, num_speculative_tokens]. vLLM asks before what was sampled is known here: see ``propose_rows``.

        What stands on the device until the next chains are written there: a valid token wherever it could be read. vLLM may
        write into it.
        """
        return torch.zeros((input_batch.num_reqs, self._num_tokens), dtype=torch.int64, device=self._device)

    def follow_step(self, runner: GPUModelRunner, scheduler_output: Any) -> None:
        """Before a target forward."""
        self._step = scheduler_output
        fresh: set[str] = set()
        if self._proposer is not None:
            with self._proposer.guard():
                fresh = self._follow_texts(scheduler_output) | self._follow_seeds(scheduler_output, runner)
        self.begin_step(
            scheduler_output,
            lambda new: self._texts.tokens(new.req_id).copy() if new.req_id in fresh else None,
            lambda new: self._seeds[new.req_id],
        )
        self._write_drafts(runner.req_states, scheduler_output.scheduled_spec_decode_tokens)

    def _follow_texts(self, scheduler_output: Any) -> set[str]:
        """Keep the texts of live requests; returns whose are new.

        V2 calls a request new when it was preempted, too: its text is then the one that it had.
        """
        texts, fresh = self._texts, set()
        for request_id in scheduler_output.finished_req_ids:
            texts.stop(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            is_known = new.req_id in texts.rows
            if not is_known or not np.array_equal(texts.tokens(new.req_id), new.prefill_token_ids):
                texts.start(new.req_id, new.prefill_token_ids)
                fresh.add(new.req_id)
        return fresh

    def _follow_seeds(self, scheduler_output: Any, runner: GPUModelRunner) -> set[str]:
        """Keep the seeds of live requests; returns whose are new: vLLM draws another one if a request was preempted."""
        seeds, fresh = self._seeds, set()
        for request_id in scheduler_output.finished_req_ids:
            seeds.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            index = runner.req_states.req_id_to_index[new.req_id]
            seed = int(runner.sampler.sampling_states.seeds.np[index])
            if seeds.get(new.req_id) != seed:
                seeds[new.req_id] = seed
                fresh.add(new.req_id)
        return fresh

    def _write_drafts(self, states: Any, scheduled: dict[str, list[int]]) -> None:
        """Put the tokens that are to be verified where the forward reads them."""
        if not scheduled:
            return
        drafts = np.zeros((len(scheduled), self._num_tokens), np.int64)
        for row, tokens in zip(drafts, scheduled.values(), strict=True):
            row[: len(tokens)] = tokens
        np.maximum(drafts, 0, out=drafts)  # the scheduler's own placeholders are -1
        device = states.draft_tokens.device
        index = torch.tensor([states.req_id_to_index[request_id] for request_id in scheduled], device=device)
        states.draft_tokens[index] = torch.from_numpy(drafts).to(device)

    def propose_rows(self, output: ModelRunnerOutput) -> DraftTokenIds:
        """After a target forward: the chains to verify next, one per row of the batch."""
        scheduler_output, sampled, texts = self._step, output.sampled_token_ids, self._texts
        verified = scheduler_output.scheduled_spec_decode_tokens
        if self._proposer is not None:
            with self._proposer.guard():
                for request_id, tokens in zip(output.req_ids, sampled, strict=True):
                    texts.extend(request_id, tokens)

        def rows() -> Batch:
            names = output.req_ids
            # A request whose text got lost goes without draft tokens: it is a row in which nothing was sampled.
            places = [texts.rows.get(name, 0) for name in names]
            counts = [len(tokens) if name in texts.rows else 0 for name, tokens in zip(names, sampled, strict=True)]
            return Batch.at(
                names,
                texts.buffer,
                places,
                texts.lengths[places].tolist(),
                counts,
                [verified.get(name, ()) for name in names],
            )

        self._drafts = DraftTokenIds(output.req_ids, self.end_step(scheduler_output, len(sampled), rows))
        return self._drafts

    def take_drafts(self) -> DraftTokenIds | None:
        """The chains of the last step, once."""
        drafts, self._drafts = self._drafts, None
        return drafts


def share_noise(runner: GPUModelRunner) -> None:
    """Have the runner accept a draft token if it is what its sampler draws there, and draw all tokens with vLLM's own noise."""
    sampler, rejection_sampler = runner.sampler, runner.rejection_sampler
    sampler.use_flashinfer = sampler.use_xpu_sampler = False  # they draw with noise of their own
    if rejection_sampler is not None:  # this rank samples
        rejection_sampler._verify = functools.partial(verify_chains, rejection_sampler)


def verify_chains(
    verifier: Any, logits: torch.Tensor, draft_logits: Any, draft_sampled: torch.Tensor, pos: torch.Tensor,
    cu_num_logits: torch.Tensor, idx_mapping: torch.Tensor, idx_mapping_np: npt.NDArray[Any],
    expanded_idx_mapping: torch.Tensor, expanded_local_pos: torch.Tensor, seq_lens_upper_bound_np: npt.NDArray[Any],
    verify_draft_sampled: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """In place of ``RejectionSampler._verify`` (``verifier``): every row is drawn as a row without drafts would be.

    Returns the processed logits [rows, vocabulary], int64 [requests, num_speculative_steps + 1], of which the first
    int32 [requests] are what was drawn.
    """
    sampler = verifier.sampler
    states = sampler.sampling_states
    processed = sampler.apply_sampling_params(
        logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, draft_sampled, expanded_local_pos,
        seq_lens_upper_bound_np,
    )  # fmt: skip
    drawn = gumbel_sample(
        processed, expanded_idx_mapping, states.temperature.gpu, states.seeds.gpu, pos,
        apply_temperature=False, is_drafting=False, use_fp64=sampler.use_fp64_gumbel,
    )  # fmt: skip
    drafts = draft_sampled if verify_draft_sampled is None else verify_draft_sampled
    starts, ends = cu_num_logits[:-1].unsqueeze(1), cu_num_logits[1:].unsqueeze(1)
    rows = starts + torch.arange(verifier.num_speculative_steps + 1, device=logits.device)
    sampled = drawn[rows.clamp(max=len(drawn) - 1)]
    # A draft token stands in the row that it is read in, which is the one behind the row that it is drawn in.
    following = drafts[(rows[:, :-1] + 1).clamp(max=len(drafts) - 1)]
    is_accepted = (sampled[:, :-1] == following) & (rows[:, :-1] + 1 < ends)
    num_sampled = is_accepted.cumprod(dim=1).sum(dim=1) + 1
    return processed, sampled, num_sampled.to(torch.int32)
