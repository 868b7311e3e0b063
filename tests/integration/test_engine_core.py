"""The engine core and its worker: how one waits for the other, and how often one asks the other."""

import inspect
import os
import pickle
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_double.hosting.cores import CoreSplit
from vllm_double.integration import engine_core, front_end, launch, rank, speculative_config, v1
from vllm_double.integration.speculative_config import DoubleSpeculativeConfig
from vllm_double.target.proposer import RequestParams

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


def test_another_method_is_scheduled_without_placeholders_or_ours_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours:
        pass

    def vllms(self: Any, vllm_config: Any, log_stats: bool) -> None:
        self.__dict__.update(num_spec_tokens=4, max_num_running_reqs=2, dynamic_sd_lookup=None)

    monkeypatch.setattr(Scheduler, "__init__", vllms)
    for _ in range(2):
        engine_core.schedule_without_placeholders(Ours)
    for speculative, expected in ((Ours(), [4, 4, 4]), (object(), None), (None, None)):
        scheduler: Any = Scheduler(vllm_config=SimpleNamespace(speculative_config=speculative), log_stats=True)
        assert scheduler.dynamic_sd_lookup == expected


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


def test_an_output_of_asynchronous_scheduling_is_left_alone(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = object()  # it names no requests
    monkeypatch.setattr(GPUModelRunner, "sample_tokens", lambda self, grammar: output)
    monkeypatch.setattr(GPUModelRunner.propose_draft_token_ids, "_vllm_double_wrapped", False)
    v1._wrap_runner()
    runner.drafter = object()
    assert runner.sample_tokens(None) is output


@pytest.mark.parametrize(
    ("cores", "launcher", "expected"),
    [
        (SPLIT, os.getppid(), ["requests", {0, 1}, "wait"]),
        (None, os.getppid(), ["requests", set()]),
        (SPLIT, os.getpid(), ["requests"]),
    ],
)
def test_only_the_engine_core_is_changed_and_its_wait_only_beside_a_draft_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, cores: CoreSplit | None, launcher: int, expected: list[Any]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(speculative_config, "_teach_process", lambda: calls.append("requests"))
    monkeypatch.setattr(speculative_config, "wait_asleep", lambda: calls.append("wait"))
    monkeypatch.setattr(speculative_config, "receive_drafts", lambda cores: calls.append(set(cores)))
    config = object.__new__(DoubleSpeculativeConfig)
    config.__dict__.update(cores=cores, launcher=launcher)
    received = pickle.loads(pickle.dumps(config))
    assert received.launcher == launcher
    assert calls == expected


LORA = LoRARequest("french", 1, "/adapters/french")


def _inform(monkeypatch: pytest.MonkeyPatch) -> None:
    vllms = inspect.unwrap(NewRequestData.from_request.__func__)  # an earlier test may have configured method double
    monkeypatch.setattr(NewRequestData, "from_request", classmethod(vllms))
    monkeypatch.setattr(Scheduler, "reset_prefix_cache", Scheduler.reset_prefix_cache)
    engine_core.inform_workers()
    engine_core.inform_workers()


def _sent(request: Request) -> Any:
    return pickle.loads(pickle.dumps(NewRequestData.from_request(request, ([0],))))


def _params(
    monkeypatch: pytest.MonkeyPatch, salt: Any = None, double: Any = None, lora: LoRARequest | None = None
) -> RequestParams:
    """What the worker makes of a request after its way from the scheduler."""
    _inform(monkeypatch)
    sampling = SamplingParams(max_tokens=10, extra_args={"double": double} if double is not None else None)
    request = Request("r", [1, 2], sampling, None, cache_salt=salt, lora_request=lora)
    proposer = object.__new__(v1.DoubleProposer)
    proposer._max_model_len, proposer._said_unreadable = 100, False
    return proposer._params(_sent(request), 5)


def test_the_salt_reaches_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _params(monkeypatch).tenant is None
    assert _params(monkeypatch, salt="").tenant is None, "to vLLM, too, this is none"
    assert _params(monkeypatch, lora=LORA).tenant is None
    first, again = (_params(monkeypatch, salt="a").tenant for _ in range(2))
    assert first is not None and first == again


def test_two_that_are_not_the_same_share_a_history(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = LoRARequest("french", 2, "/adapters/better-french")
    known = _params(monkeypatch, salt="a").tenant
    tenants = [
        known,
        *(_params(monkeypatch, salt=salt).tenant for salt in ("x" * 5000, "x" * 5001, 5, ["a"])),
        *(_params(monkeypatch, salt="a", lora=lora).tenant for lora in (LORA, moved)),
        _params(monkeypatch, double={"tenant": "a"}).tenant,
        _params(monkeypatch, double={"tenant": known}).tenant,
        _params(monkeypatch, salt="b", double={"tenant": "a"}).tenant,
    ]
    assert None not in tenants and len(set(tenants)) == len(tenants)


def test_a_reset_of_the_prefix_cache_reaches_the_draft_before_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def reset(self: Scheduler, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if reset_running_requests:
            raise RuntimeError("half way")
        done.append(("vLLM's", reset_connector))
        return False

    monkeypatch.setattr(Scheduler, "reset_prefix_cache", reset)
    _inform(monkeypatch)
    drafter = object.__new__(v1.DoubleProposer)
    drafter._max_model_len, drafter._num_resets = 100, 0
    drafter._seeds, drafter._new_seeds = {}, np.random.default_rng(0)
    drafter._proposer = SimpleNamespace(
        admit=lambda request_id, tokens, params: done.append(request_id),
        reset_prefix_cache=lambda: done.append("ours"),
        guard=nullcontext,
    )

    def step(*ids: str) -> None:
        batch = SimpleNamespace(
            req_id_to_index=dict.fromkeys(ids, 0), token_ids_cpu=np.array([[1, 2]]), num_tokens_no_spec=np.array([2]),
            generators={},
        )  # fmt: skip
        runner = SimpleNamespace(input_batch=batch)
        new = [_sent(Request(name, [1, 2], SamplingParams(max_tokens=10), None)) for name in ids]
        drafter.follow_step(runner, SimpleNamespace(finished_req_ids=(), scheduled_new_reqs=new, num_scheduled_tokens={}))

    scheduler = object.__new__(Scheduler)
    step("a", "b")
    assert scheduler.reset_prefix_cache(reset_connector=True) is False
    scheduler.reset_prefix_cache()
    step("c", "d")
    step("e")
    with pytest.raises(RuntimeError, match="half way"):
        scheduler.reset_prefix_cache(True)
    step("f")
    assert done == ["a", "b", ("vLLM's", True), ("vLLM's", False), "ours", "c", "d", "e", "ours", "f"]


def test_what_cannot_be_read_costs_the_request_its_drafts_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert _params(monkeypatch, salt="a", double={}).use_drafts
    for double in (7, "off", {"tenant": 5}, {"unknown": 1}):
        assert not _params(monkeypatch, salt="a", double=double).use_drafts
    proposer = object.__new__(v1.DoubleProposer)
    proposer._said_unreadable = False
    caplog.clear()
    for _ in range(3):
        proposer._args(SimpleNamespace(extra_args={"double": 7}))
    assert len(caplog.records) == 1


def test_the_front_end_refuses_what_cannot_be_read_under_method_double_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(SamplingParams, "_validate_spec_decode", lambda self, speculative: checked.append(speculative))
    front_end.check_requests(DoubleSpeculativeConfig)
    front_end.check_requests(DoubleSpeculativeConfig)
    double = object.__new__(DoubleSpeculativeConfig)
    good, bad = (SamplingParams(extra_args={"double": {"tenant": tenant}}) for tenant in ("a", 5))
    good._validate_spec_decode(double)
    bad._validate_spec_decode(None)
    with pytest.raises(VLLMValidationError, match="must be text"):
        bad._validate_spec_decode(double)
    assert checked == [None], "vLLM's own check is for other methods"


def test_min_p_and_logit_bias_are_refused_for_other_methods_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamplingParams, "_validate_spec_decode", SamplingParams._validate_spec_decode)
    front_end.check_requests(DoubleSpeculativeConfig)
    double = object.__new__(DoubleSpeculativeConfig)
    for params in (SamplingParams(min_p=0.1), SamplingParams(logit_bias={5: 1.0})):
        params._validate_spec_decode(double)
        with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
            params._validate_spec_decode(SimpleNamespace(method="ngram"))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker whose methods do nothing but fail where told to; ``forgot`` counts."""

    def act(self: Any, *args: Any, **kwargs: Any) -> str:
        if self.fails:
            raise RuntimeError("half way")
        return "done"

    for name in ("compile_or_warm_up_model", "reload_weights", "update_weights", "finish_weight_update", "sleep", "add_lora"):
        monkeypatch.setattr(Worker, name, act)
    rank.wrap_worker()
    rank.wrap_worker()
    worker = object.__new__(Worker)
    worker.fails, worker.forgot = False, 0

    def forget() -> None:
        worker.forgot += 1

    drafter = object.__new__(v1.DoubleProposer)
    drafter._proposer = SimpleNamespace(forget_history=forget)
    worker.model_runner = SimpleNamespace(drafter=drafter)
    return worker


@pytest.mark.parametrize(
    ("method", "arguments", "forgot"),
    [
        ("reload_weights", {"weights_path": "other"}, 1),
        ("update_weights", {"update_info": {}}, 1),
        ("finish_weight_update", {}, 1),
        ("sleep", {}, 0),
        ("sleep", {"level": 1}, 0),
        ("sleep", {"level": 2}, 1),
        ("add_lora", {"lora_request": LORA}, 0),
        ("add_lora", {"lora_request": LoRARequest("french", 1, "/adapters/french", load_inplace=True)}, 1),
    ],
)
def test_history_goes_with_the_weights(worker: Any, method: str, arguments: dict[str, Any], forgot: int) -> None:
    assert getattr(worker, method)(**arguments) == "done"
    assert worker.forgot == forgot
    worker.fails = True
    with pytest.raises(RuntimeError, match="half way"):
        getattr(worker, method)(**arguments)
    assert worker.forgot == 2 * forgot, "a change that failed may have changed something"
    worker.fails, worker.model_runner.drafter = False, object()
    assert getattr(worker, method)(**arguments) == "done"


def test_history_goes_when_weights_are_loaded_past_vllm(worker: Any) -> None:
    model = SimpleNamespace(load_weights=lambda weights: set(weights))
    worker.model_runner.drafter.load_model(model)
    assert worker.forgot == 0
    assert model.load_weights(iter(["a"])) == {"a"}
    assert worker.forgot == 1


def test_the_draft_is_loaded_while_the_target_measures_memory_or_warm_up_counts_as_steps(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[object, str]] = []
    monkeypatch.setattr(launch, "DraftSupervisor", lambda settings, address: started.append((settings, address)) or object())
    made = object.__new__(launch.Launch)
    made._settings, made._end, made._supervisor = "settings", SimpleNamespace(address="here"), None  # type: ignore[assignment]
    forgot: list[bool] = []
    drafter = worker.model_runner.drafter
    drafter._launch, drafter._proposer = made, SimpleNamespace(forget_step_cost=lambda: forgot.append(True))
    assert started == []
    for _ in range(2):
        assert worker.compile_or_warm_up_model() == "done"
    assert started == [("settings", "here")] and forgot == [True, True]
