"""What method double changes in the engine core's process: its scheduler, and how it waits for its workers.

Without asynchronous scheduling the engine core asks its workers three times a step: compute, sample, hand over the drafts. The
worker computes and samples at the first (see ``v1``), and its answer carries the drafts; the scheduler takes them from it.
"""

import functools
import logging
import os
import time
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_double.hosting.cores import bind_all_threads
from vllm_double.wrap import wrap_once

__all__ = ["DRAFTS_ATTRIBUTE", "RESETS_ATTRIBUTE", "SALT_ATTRIBUTE", "DoubleScheduler", "attach", "sleep_while_waiting"]

_logger = logging.getLogger(__name__)

DRAFTS_ATTRIBUTE = "double_draft_token_ids"  # of a ModelRunnerOutput: what the worker's take_draft_token_ids would return
SALT_ATTRIBUTE = "double_cache_salt"  # of a NewRequestData, which is pickled into the workers: the request's cache_salt
RESETS_ATTRIBUTE = "double_num_cache_resets"  # of the same: how often the prefix cache had been reset before
_LOOK_EVERY_MS = 1  # a notification can be lost: then the message is seen so much later


class DoubleScheduler(Scheduler):
    """vLLM's scheduler, and:

    - workers learn each new request's ``cache_salt``, and how often the prefix cache was reset before it;
    - the drafts are those that the worker's output carries;
    - nothing is verified that was not proposed. vLLM gives a request that begins with one token to compute, such as one whose
      prompt is cached, ``num_speculative_tokens`` placeholders, so that all rows are equally long. Ours never are.
    """

    received: Any = None
    """The drafts that came with the latest output, until they are taken."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        # vLLM adds no placeholders if a table says how many drafts there are to be at each batch size: as many as there can be.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        self._num_resets = 0
        self._cores_to_leave: set[int] = set()
        config = vllm_config.speculative_config
        if os.getppid() == config.launcher:  # this process is the engine core's own
            take_received_drafts()
            if config.cores is not None:
                sleep_while_waiting()
                self._cores_to_leave = {core for rank in config.cores.target for core in rank}

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        for new in output.scheduled_new_reqs:
            attach(new, RESETS_ATTRIBUTE, self._num_resets)
            attach(new, SALT_ATTRIBUTE, self.requests[new.req_id].cache_salt)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if self._cores_to_leave:
            self._leave_cores()
        DoubleScheduler.received = getattr(model_runner_output, DRAFTS_ATTRIBUTE, None)
        return super().update_from_output(scheduler_output, model_runner_output)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
        self._num_resets += 1  # even if vLLM refuses, or resets a part: a cold draft is only slower
        return super().reset_prefix_cache(*args, **kwargs)

    def _leave_cores(self) -> None:
        """Keep this process away from the target's cores, if there are others: on these the target stands still meanwhile.

        With the first answer and not before: workers that start inherit where this process may run, and OpenMP binds them to
        nothing else.
        """
        others, self._cores_to_leave = os.sched_getaffinity(0) - self._cores_to_leave, set()
        if others:
            bind_all_threads(others)


def attach(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of ours on an object of vLLM's. One that takes none goes without; the log says so once."""
    try:
        setattr(owner, name, value)
    except (AttributeError, TypeError, ValueError) as error:
        _warn_once(f"{type(owner).__name__} takes no attribute {name}, so there are fewer draft tokens: {error}")


@functools.cache
def _warn_once(text: str) -> None:
    _logger.warning("%s", text)


def take_received_drafts() -> None:
    """Have this process ask its workers for drafts only if their output carried none. Once per process."""

    @wrap_once(MultiprocExecutor, "take_draft_token_ids")
    def take_draft_token_ids(original: Any, self: Any) -> Any:
        drafts, DoubleScheduler.received = DoubleScheduler.received, None
        return original(self) if drafts is None else drafts


def sleep_while_waiting() -> None:
    """Have this process wait for messages on the socket that announces them, from the first moment. Once per process.

    vLLM's engine core waits for its workers by ``sched_yield`` in a loop, for a second after the last message. A kernel that
    gives equal shares hands it half of a core that the draft needs.
    """

    @wrap_once(SpinCondition, "wait")
    def wait(original: Any, self: Any, timeout_ms: int | None = None) -> None:
        if time.monotonic() > self.last_read + self.busy_loop_s:
            original(self, timeout_ms=timeout_ms)
            return
        busy_loop_s, self.busy_loop_s = self.busy_loop_s, float("-inf")
        try:
            original(self, timeout_ms=_LOOK_EVERY_MS)
        finally:
            self.busy_loop_s = busy_loop_s
