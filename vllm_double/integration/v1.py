"""The adapter to vLLM's V1 model runner.

V1 calls a custom proposer without request ids and without the scheduler's output, so three methods of the runner are wrapped.
Two more save round trips to the engine core: a step is computed and sampled at once, and its output carries the drafts. Each
method does what it did before unless the runner's drafter is ours. The sampler of our own runner draws with shared noise: see
``v1_sampling``.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.config import VllmConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_double.integration.engine_core import DRAFTS_ATTRIBUTE
from vllm_double.integration.rank import MARK, TargetRank, as_int64
from vllm_double.integration.v1_sampling import Draws, share_noise
from vllm_double.target.batch import Batch

__all__ = ["DoubleProposer"]


class DoubleProposer(TargetRank):
    """What vLLM's ``create_custom_proposer`` builds in each target worker."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        _wrap_runner()
        super().__init__(vllm_config)
        self._shares_noise = False
        self._seeds: dict[str, int] = {}  # of live requests, the same on all ranks
        self._num_scheduled: dict[str, int] = {}
        # All ranks draw the same seeds, in the order in which the scheduler sends requests.
        parallel = vllm_config.parallel_config
        self._new_seeds = np.random.default_rng([vllm_config.model_config.seed or 0, parallel.data_parallel_index])

    def load_model(self, target_model: Any) -> None:
        """vLLM calls this once. The draft model is loaded by the draft worker."""
        self.watch_weights(target_model)

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """vLLM asks for this method; the wrapped runner calls ``propose_rows`` instead."""
        raise RuntimeError("the model runner was not wrapped: vllm-double and vLLM do not fit together")

    def prepare(self, runner: GPUModelRunner) -> None:
        """Before the runner knows of a step's requests."""
        if not self._shares_noise:
            self._shares_noise = True
            share_noise(runner, lambda: self._draws(runner.input_batch))

    def _draws(self, batch: Any) -> Draws:
        """Where in their noise the requests of the batch are, as the forward reads them."""
        names = batch.req_ids
        scheduled = np.array([self._num_scheduled[name] for name in names], np.int64)
        return Draws(
            np.array([self._seeds[name] for name in names], np.int64),
            batch.num_computed_tokens_cpu[: len(names)] + scheduled - 1,
        )

    def _follow_seeds(self, scheduler_output: Any) -> None:
        for request_id in scheduler_output.finished_req_ids:
            self._seeds.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            seed = new.sampling_params.seed if new.sampling_params is not None else None
            self._seeds[new.req_id] = as_int64(seed) if seed is not None else int(self._new_seeds.integers(-(1 << 63), 1 << 63))

    def follow_step(self, runner: GPUModelRunner, scheduler_output: Any) -> None:
        """Before a target forward."""
        self._num_scheduled = scheduler_output.num_scheduled_tokens
        self._follow_seeds(scheduler_output)
        batch = runner.input_batch
        batch.generators.clear()  # nothing is drawn from them; and on a CPU they cannot skip the chunks of a prompt

        def text_of(new: Any) -> npt.NDArray[np.int32]:
            index = batch.req_id_to_index[new.req_id]
            text: npt.NDArray[np.int32] = batch.token_ids_cpu[index, : batch.num_tokens_no_spec[index]].copy()
            return text

        self.begin_step(scheduler_output, text_of, lambda new: self._seeds[new.req_id])

    def propose_rows(self, runner: GPUModelRunner, scheduler_output: Any, sampled: list[list[int]]) -> list[list[int]]:
        """After a target forward: the chains to verify next, one per row of the batch."""
        batch, verified = runner.input_batch, scheduler_output.scheduled_spec_decode_tokens

        def rows() -> Batch:
            names = batch.req_ids
            return Batch.at(
                names,
                batch.token_ids_cpu,
                range(len(names)),
                batch.num_tokens_no_spec[: len(names)].tolist(),
                [len(tokens) for tokens in sampled],
                [verified.get(name, ()) for name in names],
            )

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
        drafter = getattr(self, "drafter", None)
        if not isinstance(drafter, DoubleProposer):
            return update(self, scheduler_output)
        drafter.prepare(self)
        result = update(self, scheduler_output)
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
