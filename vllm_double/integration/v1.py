"""The adapter to vLLM's V1 model runner.

V1 calls a custom proposer without request ids and without the scheduler's output, so three methods of the runner are wrapped.
Two more save round trips to the engine core: a step is computed and sampled at once, and its output carries the drafts. Each
method does what it did before unless the runner's drafter is ours.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.config import VllmConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_double.integration.engine_core import DRAFTS_ATTRIBUTE
from vllm_double.integration.rank import MARK, TargetRank
from vllm_double.proposer import Row

__all__ = ["DoubleProposer"]


class DoubleProposer(TargetRank):
    """What vLLM's ``create_custom_proposer`` builds in each target worker."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        _wrap_runner()
        super().__init__(vllm_config)

    def load_model(self, target_model: Any) -> None:
        """vLLM calls this once. The draft model is loaded by the draft worker."""
        self.watch_weights(target_model)

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """vLLM asks for this method; the wrapped runner calls ``propose_rows`` instead."""
        raise RuntimeError("the model runner was not wrapped: vllm-double and vLLM do not fit together")

    def follow_step(self, runner: GPUModelRunner, scheduler_output: Any) -> None:
        """Before a target forward."""
        batch = runner.input_batch

        def text_of(new: Any) -> npt.NDArray[np.int32]:
            index = batch.req_id_to_index[new.req_id]
            text: npt.NDArray[np.int32] = batch.token_ids_cpu[index, : batch.num_tokens_no_spec[index]].copy()
            return text

        self.begin_step(scheduler_output, text_of)

    def propose_rows(self, runner: GPUModelRunner, scheduler_output: Any, sampled: list[list[int]]) -> list[list[int]]:
        """After a target forward: the chains to verify next, one per row of the batch."""
        batch, verified = runner.input_batch, scheduler_output.scheduled_spec_decode_tokens

        def rows() -> list[Row]:
            lengths = batch.num_tokens_no_spec
            return [
                Row(
                    request_id,
                    batch.token_ids_cpu[index, : lengths[index]],
                    len(sampled[index]),
                    verified.get(request_id, ()),
                )
                for index, request_id in enumerate(batch.req_ids)
            ]

        return self.end_step(scheduler_output, len(sampled), rows)


def _wrap_runner() -> None:
    """Wrap the methods of the runner's class, once per process."""
    if getattr(GPUModelRunner.propose_draft_token_ids, MARK, False):
        return
    propose = GPUModelRunner.propose_draft_token_ids
    fits = GPUModelRunner._input_fits_in_drafter
    update = GPUModelRunner._update_states
    execute = GPUModelRunner.execute_model
    sample = GPUModelRunner.sample_tokens

    @functools.wraps(propose)
    def propose_draft_token_ids(self: Any, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        drafter = getattr(self, "drafter", None)
        if not isinstance(drafter, DoubleProposer):
            return propose(self, scheduler_output, sampled_token_ids, *args, **kwargs)
        self._draft_probs = None
        self._draft_prob_req_ids = None
        return drafter.propose_rows(self, scheduler_output, sampled_token_ids)

    @functools.wraps(fits)
    def input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        if not isinstance(getattr(self, "drafter", None), DoubleProposer):
            return bool(fits(self, common_attn_metadata))
        # One row near max_model_len would take the drafts of all: each row's chain is clipped by itself.
        fits_rows: bool = common_attn_metadata is not None
        return fits_rows

    @functools.wraps(update)
    def update_states(self: Any, scheduler_output: Any) -> Any:
        result = update(self, scheduler_output)
        drafter = getattr(self, "drafter", None)
        if isinstance(drafter, DoubleProposer):
            drafter.follow_step(self, scheduler_output)
        return result

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        output = execute(self, scheduler_output, *args, **kwargs)
        if output is not None or scheduler_output.has_structured_output_requests:
            return output  # nothing to sample, or the engine core still makes the grammar's bitmask
        return self.sample_tokens(None) if isinstance(getattr(self, "drafter", None), DoubleProposer) else None

    @functools.wraps(sample)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample(self, *args, **kwargs)
        # Whose drafter it is comes first: other outputs, such as those of asynchronous scheduling, name no requests.
        if isinstance(getattr(self, "drafter", None), DoubleProposer) and output.req_ids:
            setattr(output, DRAFTS_ATTRIBUTE, self.take_draft_token_ids())
        return output

    setattr(propose_draft_token_ids, MARK, True)
    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids
    GPUModelRunner._input_fits_in_drafter = input_fits_in_drafter
    GPUModelRunner._update_states = update_states
    GPUModelRunner.execute_model = execute_model
    GPUModelRunner.sample_tokens = sample_tokens
