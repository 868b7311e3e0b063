"""One rank of the target, the same for both of vLLM's model runners: requests and rows in, chains of draft tokens out.

The adapters to the runners (``v1``, ``v2``) know the requests, their texts and what was sampled.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.config import VllmConfig
from vllm.v1.worker.gpu_worker import Worker

from vllm_double.config import ConfigError
from vllm_double.integration.engine_core import RESETS_ATTRIBUTE, SALT_ATTRIBUTE
from vllm_double.integration.launch import Launch
from vllm_double.integration.request_args import RequestArgs, digest
from vllm_double.target.batch import Batch
from vllm_double.target.guarded_proposer import GuardedProposer
from vllm_double.target.request_table import RequestParams
from vllm_double.wrap import then, wrap_once

__all__ = ["TargetRank", "as_int64", "wrap_worker"]

_logger = logging.getLogger(__name__)


class TargetRank:
    """What each target worker has. Only the output rank proposes; every rank verifies the chains that the scheduler sends."""

    _requires_salt = False

    def __init__(self, vllm_config: VllmConfig) -> None:
        wrap_worker()
        self._max_model_len = vllm_config.model_config.max_model_len
        self._requires_salt = vllm_config.speculative_config.double.require_salt
        self._launch = Launch(vllm_config) if _is_output_rank() else None
        self._proposer: GuardedProposer | None = self._launch.proposer if self._launch is not None else None
        self._step_started = 0.0
        self._num_resets = 0
        self._said_unreadable = False

    def join(self, worker: Any) -> None:
        """Set attributes on this worker and on its model, which are complete now; other workers stay as they are.

        Trainers load weights straight into the model, past the worker.
        """

        def forget_if_lost(level: int = 1) -> None:
            if level > 1:
                self.forget_history()

        def forget_if_replaced(lora_request: Any) -> None:
            if lora_request.load_inplace:
                self.forget_history()

        then(worker, "compile_or_warm_up_model", self.begin_service)
        for owner, name in (
            (worker, "reload_weights"),
            (worker, "update_weights"),
            (worker, "finish_weight_update"),
            (worker.model_runner.model, "load_weights"),
        ):
            then(owner, name, self.forget_history)
        then(worker, "sleep", forget_if_lost)
        then(worker, "add_lora", forget_if_replaced)

    def forget_history(self, *_: Any, **__: Any) -> None:
        """The target's weights changed."""
        if self._proposer is not None:
            self._proposer.forget_history()

    def begin_service(self) -> None:
        """The target has taken its memory and has warmed up."""
        if self._launch is not None and self._proposer is not None:
            self._launch.start_draft()
            self._proposer.forget_step_cost()  # vLLM compiles in the steps by which it warms up

    def begin_step(
        self, scheduler_output: Any, text_of: Callable[[Any], npt.NDArray[np.int32] | None], seed_of: Callable[[Any], int]
    ) -> None:
        """Before a target forward: requests that ended, requests that are new.

        text_of: the text of a new request, int32 [n], the caller's no more; None if it goes on with the text that it had.
        seed_of: the seed of its noise, int64.
        """
        proposer = self._proposer
        if proposer is None:
            return
        for request_id in scheduler_output.finished_req_ids:
            proposer.finish(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            num_resets = getattr(new, RESETS_ATTRIBUTE, 0)
            if num_resets != self._num_resets:
                self._num_resets = num_resets
                proposer.reset_prefix_cache()
            with proposer.guard():
                text = text_of(new)
                if text is not None:
                    proposer.admit(new.req_id, text, self._params(new, seed_of(new)))
        self._step_started = time.perf_counter()

    def end_step(self, scheduler_output: Any, num_rows: int, batch_of: Callable[[], Batch]) -> list[list[int]]:
        """After a target forward and its sampling: the chains to verify next, one per row of the batch."""
        proposer = self._proposer
        if proposer is None:
            return [[] for _ in range(num_rows)]
        with proposer.guard():
            verified = scheduler_output.scheduled_spec_decode_tokens
            num_tokens = scheduler_output.total_num_scheduled_tokens
            if num_tokens == num_rows + sum(map(len, verified.values())):
                proposer.step_cost.observe(num_tokens, time.perf_counter() - self._step_started)
            return proposer.propose(batch_of())
        return [[] for _ in range(num_rows)]  # an exception ended there

    def _params(self, new: Any, seed: int) -> RequestParams:
        sampling = new.sampling_params
        if sampling is None:
            return RequestParams(0.0, 0, frozenset(), use_drafts=False)
        stops = set(sampling.stop_token_ids or ())
        if sampling.eos_token_id is not None and not sampling.ignore_eos:
            stops.add(sampling.eos_token_id)
        max_tokens = sampling.max_tokens if sampling.max_tokens is not None else self._max_model_len
        has_text = new.prompt_embeds is None and new.prompt_token_ids is not None
        args = self._args(sampling)
        # Both count: who may choose a tenant must not reach behind another's salt. And what speaks through another adapter
        # foretells this one badly.
        salt, lora = getattr(new, SALT_ATTRIBUTE, None), new.lora_request
        adapter = (lora.lora_name, lora.lora_int_id, lora.lora_path) if lora is not None else None
        is_named = bool(salt or (args.tenant and not self._requires_salt))
        owner = digest(salt) if salt else ""  # of the tenant: see HistoryRetriever
        return RequestParams(
            temperature=sampling.temperature,
            max_length=min(self._max_model_len, new.prompt_len + max_tokens),
            stop_token_ids=frozenset(stops),
            tenant=f"{owner}/{digest(salt, args.tenant, adapter)}" if is_named else None,
            use_drafts=has_text and args.enabled and hasattr(new, SALT_ATTRIBUTE),  # else nobody knows whose it is
            use_worker=not new.mm_features,
            seed=seed,
            top_k=max(sampling.top_k, 0),
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )

    def _args(self, sampling: Any) -> RequestArgs:
        """The request's own settings. If they cannot be read, it gets no draft tokens: the front end should have refused it."""
        try:
            return RequestArgs.parse(sampling.extra_args)
        except ConfigError as error:
            if not self._said_unreadable:
                self._said_unreadable = True
                _logger.warning("A request gets no draft tokens, and so will others like it: %s", error)
            return RequestArgs(enabled=False)  # whoever it names, its text stays out of everybody's history


def as_int64(seed: int) -> int:
    """A request's seed as vLLM's noise takes it."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _is_output_rank() -> bool:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0)


def wrap_worker() -> None:
    """Have a worker whose model runner has a rank of ours meet it when both are complete. Once per process."""

    @wrap_once(Worker, "initialize_from_config")
    def initialize_from_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name in ("drafter", "speculator"):  # the V1 runner's and the V2 runner's
            rank = getattr(self.model_runner, name, None)
            if isinstance(rank, TargetRank):
                rank.join(self)
