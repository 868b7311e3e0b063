"""The engine core and its worker: how one waits for the other, and how often one asks the other."""

import os
import pickle
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_double.draft.affinity import CoreSplit
from vllm_double.integration import engine_core, speculative_config, v1
from vllm_double.integration.speculative_config import DoubleSpeculativeConfig

SPLIT = CoreSplit(target=((0,), (1,)), draft=(2,), shared=False, bind="0|1")


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)  # put back afterwards
    engine_core.wait_asleep()


@pytest.fixture
def ends() -> Iterator[tuple[SpinCondition, SpinCondition]]:
    context = zmq.Context()
    address = f"inproc://double-{os.getpid()}"
    writer = SpinCondition(is_reader=False, context=context, notify_address=address)
    reader = SpinCondition(is_reader=True, context=context, notify_address=address)
    yield writer, reader
    context.destroy(linger=0)


def test_a_busy_reader_sleeps_instead_of_spinning(patched: None, ends: tuple[SpinCondition, SpinCondition]) -> None:
    _, reader = ends
    reader.record_read()
    started = time.perf_counter()
    for _ in range(20):
        reader.wait()
    assert time.perf_counter() - started >= 0.018, "each wait is a millisecond when nothing is announced"
    assert reader.busy_loop_s == 1


def test_an_announcement_ends_the_wait(patched: None, ends: tuple[SpinCondition, SpinCondition]) -> None:
    writer, reader = ends
    reader.last_read = time.monotonic() + 1e6
    reader.local_notify_socket.poll(100)
    for _ in range(20):
        writer.notify()
        assert reader.local_notify_socket.poll(10_000)
        started = time.perf_counter()
        reader.wait()
        assert not reader.local_notify_socket.poll(0), "it was taken"
        assert time.perf_counter() - started < 10


def test_an_idle_reader_waits_as_before(patched: None, ends: tuple[SpinCondition, SpinCondition]) -> None:
    _, reader = ends
    reader.last_read = time.monotonic() - 10
    started = time.perf_counter()
    reader.wait(timeout_ms=30)
    assert time.perf_counter() - started >= 0.029


def test_patching_twice_is_patching_once(patched: None) -> None:
    once = SpinCondition.wait
    engine_core.wait_asleep()
    assert SpinCondition.wait is once


def _output(tokens: list[int], drafts: DraftTokenIds | None) -> Any:
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}, sampled_token_ids=[tokens])
    setattr(output, engine_core.DRAFTS_ATTRIBUTE, drafts)
    return pickle.loads(pickle.dumps(output))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An engine core that receives drafts; every question to its worker is noted."""
    questions: list[str] = []
    monkeypatch.setattr(Scheduler, "update_from_output", lambda self, scheduled, output: output.sampled_token_ids)
    monkeypatch.setattr(MultiprocExecutor, "take_draft_token_ids", lambda self: questions.append("drafts") or "from the worker")
    engine_core.receive_drafts(())
    engine_core.receive_drafts(())
    return questions


def test_drafts_come_with_the_output(asked: list[str]) -> None:
    scheduler, executor = object.__new__(Scheduler), object.__new__(MultiprocExecutor)
    assert scheduler.update_from_output(None, _output([5], DraftTokenIds(["a"], [[1, 2]]))) == [[5]]
    received = executor.take_draft_token_ids()
    assert received is not None
    assert received.draft_token_ids == [[1, 2]]
    assert asked == []


def test_the_worker_is_asked_where_no_drafts_came(asked: list[str]) -> None:
    scheduler, executor = object.__new__(Scheduler), object.__new__(MultiprocExecutor)
    scheduler.update_from_output(None, _output([5], DraftTokenIds(["a"], [[1]])))
    scheduler.update_from_output(None, _output([6], None))  # type: ignore[arg-type]
    assert executor.take_draft_token_ids() == "from the worker", "drafts of an earlier step are not those of this one"
    scheduler.update_from_output(None, _output([7], DraftTokenIds(["a"], [[1]])))
    executor.take_draft_token_ids()
    assert executor.take_draft_token_ids() == "from the worker", "drafts are handed over once"
    assert len(asked) == 2


@pytest.mark.parametrize(("target", "expected"), [({0, 1}, [{2, 3}]), ({0, 1, 2, 3}, []), (set(), [])])
def test_with_the_first_answer_the_engine_core_leaves_the_targets_cores(
    monkeypatch: pytest.MonkeyPatch, target: set[int], expected: list[set[int]]
) -> None:
    bound: list[set[int]] = []
    monkeypatch.setattr(Scheduler, "update_from_output", lambda self, scheduled, output: None)
    monkeypatch.setattr(MultiprocExecutor, "take_draft_token_ids", MultiprocExecutor.take_draft_token_ids)  # put back
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(engine_core, "bind_all_threads", bound.append)
    engine_core.receive_drafts(target)
    assert bound == [], "workers that start inherit where this process may run"
    for _ in range(2):
        object.__new__(Scheduler).update_from_output(None, _output([5], None))  # type: ignore[arg-type]
    assert bound == expected


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runner whose forward leaves logits behind and whose sampling proposes drafts; its drafter is ours."""
    for name in ("propose_draft_token_ids", "_input_fits_in_drafter", "_update_states"):
        monkeypatch.setattr(GPUModelRunner, name, getattr(GPUModelRunner, name))  # put back afterwards
    monkeypatch.setattr(GPUModelRunner.propose_draft_token_ids, "_vllm_double_wrapped", False, raising=False)
    monkeypatch.setattr(GPUModelRunner, "execute_model", lambda self, scheduled, tensors=None: scheduled.output)
    sampled = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}, sampled_token_ids=[[5]])
    monkeypatch.setattr(GPUModelRunner, "sample_tokens", lambda self, grammar: sampled)
    monkeypatch.setattr(GPUModelRunner, "take_draft_token_ids", lambda self: DraftTokenIds(["a"], [[1, 2]]))
    v1._wrap_runner()
    runner = object.__new__(GPUModelRunner)
    runner.drafter = object.__new__(v1.DoubleProposer)
    return runner


def _scheduled(output: Any = None, grammar: bool = False) -> Any:
    return SimpleNamespace(output=output, has_structured_output_requests=grammar)


def test_a_step_is_computed_and_sampled_in_one_answer(runner: Any) -> None:
    output = runner.execute_model(_scheduled())
    assert output.sampled_token_ids == [[5]]
    assert getattr(output, engine_core.DRAFTS_ATTRIBUTE).draft_token_ids == [[1, 2]]


def test_with_a_grammar_sampling_waits_for_its_bitmask(runner: Any) -> None:
    assert runner.execute_model(_scheduled(grammar=True)) is None
    assert getattr(runner.sample_tokens("bitmask"), engine_core.DRAFTS_ATTRIBUTE) is not None


def test_an_empty_step_is_answered_as_before(runner: Any) -> None:
    empty = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    assert runner.execute_model(_scheduled(empty)) is empty
    assert not hasattr(empty, engine_core.DRAFTS_ATTRIBUTE)


def test_another_drafter_is_left_alone(runner: Any) -> None:
    runner.drafter = object()
    assert runner.execute_model(_scheduled()) is None
    assert not hasattr(runner.sample_tokens(None), engine_core.DRAFTS_ATTRIBUTE)


@pytest.mark.parametrize(
    ("cores", "launcher", "expected"),
    [
        (SPLIT, os.getppid(), [{0, 1}, "wait"]),
        (None, os.getppid(), [set()]),
        (SPLIT, os.getpid(), []),
    ],
)
def test_only_the_engine_core_is_changed_and_its_wait_only_beside_a_draft_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, cores: CoreSplit | None, launcher: int, expected: list[Any]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(speculative_config, "wait_asleep", lambda: calls.append("wait"))
    monkeypatch.setattr(speculative_config, "receive_drafts", lambda cores: calls.append(set(cores)))
    config = object.__new__(DoubleSpeculativeConfig)
    config.__dict__.update(cores=cores, launcher=launcher)
    received = pickle.loads(pickle.dumps(config))
    assert received.launcher == launcher
    assert calls == expected
