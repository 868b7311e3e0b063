"""The adapter to vLLM's V1 model runner.

V1 calls a custom proposer without request ids and without the scheduler's output, so three methods of our own runner are
replaced. Two more save round trips to the engine core: a step is computed and sampled at once, and its output carries the
drafts. The runner's sampler draws with shared noise: see ``v1_sampling``.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.config import VllmConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_double.integration.engine_core import DRAFTS_ATTRIBUTE, attach
from vllm_double.integration.rank import TargetRank, as_int64
from vllm_double.integration.v1_sampling import Draws, share_noise
from vllm_double.target.batch import Batch
from vllm_double.wrap import wrap_once

__all__ = ["DoubleProposer"]


class DoubleProposer(TargetRank):
    """What vLLM's ``create_custom_proposer`` builds in each target worker."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        self._shares_noise = False
        self._seeds: dict[str, int] = {}  # of live requests, the same on all ranks
        self._num_scheduled: dict[str, int] = {}
        # All ranks draw the same seeds, in the order in which the scheduler sends requests.
        parallel = vllm_config.parallel_config
        self._new_seeds = np.random.default_rng([vllm_config.model_config.seed or 0, parallel.data_parallel_index])

    def load_model(self, target_model: Any) -> None:
        """vLLM calls this once. The draft model is loaded by the draft worker."""

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """vLLM asks for this method; our own runner calls ``propose_rows`` instead."""
        raise RuntimeError("the model runner was not changed: vllm-double and vLLM do not fit together")

    def join(self, worker: Any) -> None:
        super().join(worker)
        runner = worker.model_runner

        @wrap_once(runner, "propose_draft_token_ids")
        def propose_draft_token_ids(original: Any, scheduler_output: Any, sampled: Any, *args: Any, **kwargs: Any) -> Any:
            runner._draft_probs = runner._draft_prob_req_ids = None
            return self.propose_rows(runner, scheduler_output, sampled)

        @wrap_once(runner, "_input_fits_in_drafter")
        def input_fits_in_drafter(original: Any, common_attn_metadata: Any) -> bool:
            # One row near max_model_len would take the drafts of all: each row's chain is clipped by itself.
            return common_attn_metadata is not None

        @wrap_once(runner, "_update_states")
        def update_states(original: Any, scheduler_output: Any) -> Any:
            self.prepare(runner)
            result = original(scheduler_output)
            self.follow_step(runner, scheduler_output)
            return result

        @wrap_once(runner, "execute_model")
        def execute_model(original: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(scheduler_output, *args, **kwargs)
            if output is not None or scheduler_output.has_structured_output_requests:
                return output  # nothing to sample, or the engine core still makes the grammar's bitmask
            return runner.sample_tokens(None)

        @wrap_once(runner, "sample_tokens")
        def sample_tokens(original: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if output.req_ids:
                attach(output, DRAFTS_ATTRIBUTE, runner.take_draft_token_ids())
            return output

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
