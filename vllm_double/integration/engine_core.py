"""What method double changes in the engine core's process.

Without asynchronous scheduling the engine core asks its workers three times a step: compute, sample, hand over the drafts. The
worker computes and samples at the first (see ``v1``), and its answer carries the drafts; ``receive_drafts`` takes them from it.

vLLM's engine core waits for its workers by ``sched_yield`` in a loop, for a second after the last message: a kernel that gives
equal shares hands it half of a core that the draft needs, and the engine core has no core of its own on a small CPU host.
``wait_asleep`` leaves that core to the draft. And the kernel moves the engine core to the target's core, where every
millisecond of it is one that the target stands still: ``receive_drafts`` keeps it away from there.

A request's ``cache_salt`` ends in the scheduler, and so does a reset of the prefix cache: ``inform_workers`` takes both on to
the workers.

A request that begins with one token to compute, such as one whose prompt is cached, is given ``num_speculative_tokens``
placeholders to verify by vLLM, so that all rows are equally long. Ours never are: ``schedule_without_placeholders``.
"""

import functools
import os
import time
from collections.abc import Iterable
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_double.hosting.cores import bind_all_threads

__all__ = [
    "DRAFTS_ATTRIBUTE",
    "RESETS_ATTRIBUTE",
    "SALT_ATTRIBUTE",
    "inform_workers",
    "receive_drafts",
    "schedule_without_placeholders",
    "wait_asleep",
]

DRAFTS_ATTRIBUTE = "double_draft_token_ids"  # of a ModelRunnerOutput: what the worker's take_draft_token_ids would return
SALT_ATTRIBUTE = "double_cache_salt"  # of a NewRequestData, which is pickled into the workers: the request's cache_salt
RESETS_ATTRIBUTE = "double_num_cache_resets"  # of the same: how often the prefix cache had been reset before
_MARK = "_vllm_double_wrapped"
_LOOK_EVERY_MS = 1  # a notification can be lost: then the message is seen so much later


def wait_asleep() -> None:
    """Have this process wait for messages on the socket that announces them, from the first moment. Once per process."""
    original = SpinCondition.wait
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        if time.monotonic() > self.last_read + self.busy_loop_s:
            original(self, timeout_ms=timeout_ms)
            return
        busy_loop_s, self.busy_loop_s = self.busy_loop_s, float("-inf")
        try:
            original(self, timeout_ms=_LOOK_EVERY_MS)
        finally:
            self.busy_loop_s = busy_loop_s

    setattr(wait, _MARK, True)
    SpinCondition.wait = wait


def receive_drafts(target_cores: Iterable[int]) -> None:
    """Have this process take drafts from the workers' answers, and ask for them only where they did not come so. Once.

    target_cores: which its threads leave with the first answer, if others are left. Not before: workers that start inherit
    where this process may run, and OpenMP binds them to nothing else.
    """
    update, take = Scheduler.update_from_output, MultiprocExecutor.take_draft_token_ids
    if getattr(update, _MARK, False):
        return
    received: Any = None
    leave = set(target_cores)

    @functools.wraps(update)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        nonlocal received, leave
        if leave:
            others, leave = os.sched_getaffinity(0) - leave, set()
            if others:
                bind_all_threads(others)
        received = getattr(model_runner_output, DRAFTS_ATTRIBUTE, None)
        return update(self, scheduler_output, model_runner_output)

    @functools.wraps(take)
    def take_draft_token_ids(self: Any) -> Any:
        nonlocal received
        drafts, received = received, None
        return take(self) if drafts is None else drafts

    setattr(update_from_output, _MARK, True)
    Scheduler.update_from_output = update_from_output
    MultiprocExecutor.take_draft_token_ids = take_draft_token_ids


def schedule_without_placeholders(config_class: type) -> None:
    """Have this process's schedulers verify nothing that method double (``config_class``) did not propose. Once.

    vLLM adds no placeholders where a table says how many drafts there are to be at each batch size. Ours says that there are
    always as many as there can be, which is what vLLM assumes without one.
    """
    original = Scheduler.__init__
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if isinstance(vllm_config.speculative_config, config_class):
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    setattr(init, _MARK, True)
    Scheduler.__init__ = init


def inform_workers() -> None:
    """Have this process tell the workers each new request's ``cache_salt``, and how many resets went before it. Once."""
    original, reset = NewRequestData.from_request.__func__, Scheduler.reset_prefix_cache
    if getattr(original, _MARK, False):
        return
    num_resets = 0

    @functools.wraps(reset)
    def reset_prefix_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_resets
        num_resets += 1  # even if vLLM refuses, or resets a part: a cold draft is only slower
        return reset(self, *args, **kwargs)

    @functools.wraps(original)
    def from_request(cls: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        new = original(cls, request, *args, **kwargs)
        setattr(new, SALT_ATTRIBUTE, request.cache_salt)
        setattr(new, RESETS_ATTRIBUTE, num_resets)
        return new

    setattr(from_request, _MARK, True)
    NewRequestData.from_request = classmethod(from_request)
    Scheduler.reset_prefix_cache = reset_prefix_cache
