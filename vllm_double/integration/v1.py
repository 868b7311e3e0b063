"""The adapter to vLLM's V1 model runner: rows in, chains out.

V1 calls a custom proposer without request ids and without the scheduler's output, so three methods of the runner are wrapped.
Two more save round trips to the engine core: a step is computed and sampled at once, and its output carries the drafts. Each
method does what it did before unless the runner's drafter is ours. Methods of the worker that change the target's weights are
wrapped, too: what it said with the old ones is forgotten.
"""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_double.config import ConfigError
from vllm_double.guard import GuardedProposer
from vllm_double.integration.engine_core import DRAFTS_ATTRIBUTE, RESETS_ATTRIBUTE, SALT_ATTRIBUTE
from vllm_double.integration.launch import Launch
from vllm_double.proposer import RequestParams, Row
from vllm_double.request_args import RequestArgs, digest

__all__ = ["DoubleProposer"]

_logger = logging.getLogger(__name__)
_MARK = "_vllm_double_wrapped"


class DoubleProposer:
    """What vLLM's ``create_custom_proposer`` builds in each target worker. Only the output rank proposes."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        _wrap_runner()
        _wrap_worker()
        self._max_model_len = vllm_config.model_config.max_model_len
        self._draft_seeded = vllm_config.speculative_config.double.draft_seeded_requests
        self._launch = Launch(vllm_config) if _is_output_rank() else None
        self._proposer: GuardedProposer | None = self._launch.proposer if self._launch is not None else None
        self._step_started = 0.0
        self._num_resets = 0
        self._said_unreadable = False

    def load_model(self, target_model: Any) -> None:
        """The draft model is loaded by the draft worker. Trainers load weights straight into the target: that is seen here."""
        target_model.load_weights = _then(target_model.load_weights, lambda *args, **kwargs: self.forget_history())

    def forget_history(self) -> None:
        """The target's weights changed."""
        if self._proposer is not None:
            self._proposer.forget_history()

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """vLLM asks for this method; the wrapped runner calls ``propose_rows`` instead."""
        raise RuntimeError("the model runner was not wrapped: vllm-double and vLLM do not fit together")

    def follow_step(self, runner: GPUModelRunner, scheduler_output: Any) -> None:
        """Before a target forward: requests that ended, requests that are new."""
        proposer = self._proposer
        if proposer is None:
            return
        for request_id in scheduler_output.finished_req_ids:
            proposer.finish(request_id)
        batch = runner.input_batch
        for new in scheduler_output.scheduled_new_reqs:
            num_resets = getattr(new, RESETS_ATTRIBUTE, 0)
            if num_resets != self._num_resets:
                self._num_resets = num_resets
                proposer.reset_prefix_cache()
            with proposer.guard():
                index = batch.req_id_to_index[new.req_id]
                tokens = batch.token_ids_cpu[index, : batch.num_tokens_no_spec[index]].copy()
                proposer.admit(new.req_id, tokens, self._params(new, runner.requests[new.req_id]))
        self._step_started = time.perf_counter()

    def propose_rows(self, runner: GPUModelRunner, scheduler_output: Any, sampled: list[list[int]]) -> list[list[int]]:
        """After a target forward: the chains to verify next, one per row of the batch."""
        proposer = self._proposer
        chains: list[list[int]] = [[] for _ in sampled]
        if proposer is None:
            return chains
        with proposer.guard():
            batch = runner.input_batch
            verified = scheduler_output.scheduled_spec_decode_tokens
            num_tokens = scheduler_output.total_num_scheduled_tokens
            if num_tokens == len(sampled) + sum(map(len, verified.values())):
                proposer.step_cost.observe(num_tokens, time.perf_counter() - self._step_started)
            lengths = batch.num_tokens_no_spec
            rows = [
                Row(
                    request_id,
                    batch.token_ids_cpu[index, : lengths[index]],
                    len(sampled[index]),
                    verified.get(request_id, ()),
                )
                for index, request_id in enumerate(batch.req_ids)
            ]
            chains = proposer.propose(rows)
        return chains

    def _params(self, new: Any, state: Any) -> RequestParams:
        sampling = new.sampling_params
        if sampling is None:
            return RequestParams(0.0, 0, frozenset(), use_drafts=False)
        stops = set(sampling.stop_token_ids or ())
        if sampling.eos_token_id is not None and not sampling.ignore_eos:
            stops.add(sampling.eos_token_id)
        max_tokens = sampling.max_tokens if sampling.max_tokens is not None else self._max_model_len
        has_text = new.prompt_embeds is None and new.prompt_token_ids is not None
        # A seeded request is reproducible in plain vLLM; with drafts the draws would depend on when they were ready.
        is_seeded = sampling.seed is not None and sampling.temperature > 0
        args = self._args(sampling)
        # Both count: who may choose a tenant must not reach behind another's salt. And what speaks through another adapter
        # foretells this one badly.
        salt, lora = getattr(new, SALT_ATTRIBUTE, None), new.lora_request
        adapter = (lora.lora_name, lora.lora_int_id, lora.lora_path) if lora is not None else None
        is_named = bool(salt or args.tenant)
        return RequestParams(
            temperature=sampling.temperature,
            max_length=min(self._max_model_len, state.num_prompt_tokens + max_tokens),
            stop_token_ids=frozenset(stops),
            tenant=digest(salt, args.tenant, adapter) if is_named else None,
            use_drafts=has_text and args.enabled and (self._draft_seeded or not is_seeded),
            use_worker=not new.mm_features,
        )

    def _args(self, sampling: Any) -> RequestArgs:
        """What the request says. The front end refuses what cannot be read; where it did not, there are no drafts."""
        try:
            return RequestArgs.parse(sampling.extra_args)
        except ConfigError as error:
            if not self._said_unreadable:
                self._said_unreadable = True
                _logger.warning("a request goes without drafts, and so will others like it: %s", error)
            return RequestArgs(enabled=False)  # whoever it names, its text stays out of everybody's history


def _is_output_rank() -> bool:
    from vllm.distributed import get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0)


def _wrap_runner() -> None:
    """Wrap the methods of the runner's class, once per process."""
    if getattr(GPUModelRunner.propose_draft_token_ids, _MARK, False):
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
        if output.req_ids and isinstance(getattr(self, "drafter", None), DoubleProposer):
            setattr(output, DRAFTS_ATTRIBUTE, self.take_draft_token_ids())
        return output

    setattr(propose_draft_token_ids, _MARK, True)
    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids
    GPUModelRunner._input_fits_in_drafter = input_fits_in_drafter
    GPUModelRunner._update_states = update_states
    GPUModelRunner.execute_model = execute_model
    GPUModelRunner.sample_tokens = sample_tokens


def _wrap_worker() -> None:
    """Wrap the methods of the worker's class that change weights, once per process."""
    if getattr(Worker.reload_weights, _MARK, False):
        return

    def forget(worker: Any, *args: Any, **kwargs: Any) -> None:
        drafter = getattr(worker.model_runner, "drafter", None)
        if isinstance(drafter, DoubleProposer):
            drafter.forget_history()

    def forget_if_lost(worker: Any, level: int = 1) -> None:
        if level > 1:
            forget(worker)

    def forget_if_replaced(worker: Any, lora_request: Any) -> None:
        if lora_request.load_inplace:
            forget(worker)

    Worker.reload_weights = _then(Worker.reload_weights, forget)
    Worker.update_weights = _then(Worker.update_weights, forget)
    Worker.finish_weight_update = _then(Worker.finish_weight_update, forget)
    Worker.sleep = _then(Worker.sleep, forget_if_lost)
    Worker.add_lora = _then(Worker.add_lora, forget_if_replaced)


def _then(change: Callable[..., Any], follow: Callable[..., None]) -> Callable[..., Any]:
    """``change`` and then ``follow`` with the same arguments, even where it fails: it may have done half of its work."""

    @functools.wraps(change)
    def changed(*args: Any, **kwargs: Any) -> Any:
        try:
            return change(*args, **kwargs)
        finally:
            follow(*args, **kwargs)

    setattr(changed, _MARK, True)
    return changed
