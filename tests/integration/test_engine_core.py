"""The engine core and its worker: how one waits for the other, and how often one asks the other."""

import os
import pickle
import time
from collections import namedtuple
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
from vllm_double.integration import engine_core, front_end, launch, rank, v1
from vllm_double.integration.engine_core import DoubleScheduler
from vllm_double.integration.speculative_config import DoubleSpeculativeConfig
from vllm_double.target.proposer import RequestParams

SPLIT = CoreSplit(target=((0,), (1,)), draft=(2,), shared=False, bind="0|1")


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)  # put back afterwards
    engine_core.sleep_while_waiting()


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
    engine_core.sleep_while_waiting()
    assert SpinCondition.wait is once


def _output(tokens: list[int], drafts: DraftTokenIds | None) -> Any:
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}, sampled_token_ids=[tokens])
    setattr(output, engine_core.DRAFTS_ATTRIBUTE, drafts)
    return pickle.loads(pickle.dumps(output))


def _scheduler(monkeypatch: pytest.MonkeyPatch, cores: CoreSplit | None = None, launcher: int = 0) -> Any:
    """Our scheduler on top of one that does next to nothing."""

    def init(self: Any, vllm_config: Any, log_stats: bool) -> None:
        self.__dict__.update(num_spec_tokens=4, max_num_running_reqs=2, dynamic_sd_lookup=None, requests={})

    monkeypatch.setattr(Scheduler, "__init__", init)
    monkeypatch.setattr(Scheduler, "update_from_output", lambda self, scheduled, output: output.sampled_token_ids)
    config = SimpleNamespace(speculative_config=SimpleNamespace(launcher=launcher, cores=cores))
    return DoubleScheduler(config, log_stats=True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An engine core that receives drafts; every question to its worker is noted."""
    questions: list[str] = []
    monkeypatch.setattr(MultiprocExecutor, "take_draft_token_ids", lambda self: questions.append("drafts") or "from the worker")
    engine_core.take_received_drafts()
    engine_core.take_received_drafts()
    return questions


def test_drafts_come_with_the_output(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, executor = _scheduler(monkeypatch), object.__new__(MultiprocExecutor)
    assert scheduler.update_from_output(None, _output([5], DraftTokenIds(["a"], [[1, 2]]))) == [[5]]
    received = executor.take_draft_token_ids()
    assert received is not None
    assert received.draft_token_ids == [[1, 2]]
    assert asked == []


def test_objects_that_take_no_attributes_go_without_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        engine_core.attach((), engine_core.SALT_ATTRIBUTE, "a")
    assert len(caplog.messages) == 1 and "takes no attribute double_cache_salt" in caplog.text


def test_an_output_that_takes_no_attribute_is_returned_all_the_same(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = namedtuple("Closed", "req_ids sampled_token_ids")(["a"], [[5]])
    runner.drafter = object.__new__(v1.DoubleProposer)
    other = object.__new__(GPUModelRunner)
    monkeypatch.setattr(GPUModelRunner, "sample_tokens", lambda self, grammar: closed)
    worker = object.__new__(Worker)
    worker.model_runner, other.model, other.drafter = other, SimpleNamespace(load_weights=None), runner.drafter
    other.drafter.join(worker)
    assert other.sample_tokens(None) is closed


def test_a_request_of_whom_nobody_knows_whose_it_is_gets_no_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _params(monkeypatch).use_drafts
    monkeypatch.setattr(engine_core, "attach", lambda *_: None)
    assert not _params(monkeypatch).use_drafts


def test_the_worker_is_asked_if_no_drafts_came(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, executor = _scheduler(monkeypatch), object.__new__(MultiprocExecutor)
    scheduler.update_from_output(None, _output([5], DraftTokenIds(["a"], [[1]])))
    scheduler.update_from_output(None, _output([6], None))
    assert executor.take_draft_token_ids() == "from the worker", "drafts of an earlier step are not those of this one"
    scheduler.update_from_output(None, _output([7], DraftTokenIds(["a"], [[1]])))
    executor.take_draft_token_ids()
    assert executor.take_draft_token_ids() == "from the worker", "drafts are handed over once"
    assert len(asked) == 2


def test_our_scheduler_gives_no_placeholders_and_vllms_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _scheduler(monkeypatch).dynamic_sd_lookup == [4, 4, 4]
    assert Scheduler(vllm_config=None, log_stats=True).dynamic_sd_lookup is None


@pytest.mark.parametrize(("target", "expected"), [(((0,), (1,)), [{2, 3}]), (((0, 1), (2, 3)), []), (None, [])])
def test_with_the_first_answer_the_engine_core_leaves_the_targets_cores(
    monkeypatch: pytest.MonkeyPatch, patched: None, target: Any, expected: list[set[int]]
) -> None:
    bound: list[set[int]] = []
    monkeypatch.setattr(MultiprocExecutor, "take_draft_token_ids", MultiprocExecutor.take_draft_token_ids)  # put back
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(engine_core, "bind_all_threads", bound.append)
    cores = CoreSplit(target, draft=(), shared=False, bind="") if target is not None else None
    scheduler = _scheduler(monkeypatch, cores, os.getppid())
    assert bound == [], "workers that start inherit where this process may run"
    for _ in range(2):
        scheduler.update_from_output(None, _output([5], None))
    assert bound == expected


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runner whose forward leaves logits behind and whose sampling proposes drafts; it has met our drafter."""
    sampled = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}, sampled_token_ids=[[5]])
    monkeypatch.setattr(GPUModelRunner, "execute_model", lambda self, scheduled, tensors=None: scheduled.output)
    monkeypatch.setattr(GPUModelRunner, "sample_tokens", lambda self, grammar: sampled)
    monkeypatch.setattr(GPUModelRunner, "take_draft_token_ids", lambda self: DraftTokenIds(["a"], [[1, 2]]))
    runner, worker = object.__new__(GPUModelRunner), object.__new__(Worker)
    worker.model_runner, runner.model = runner, SimpleNamespace(load_weights=None)
    runner.drafter = object.__new__(v1.DoubleProposer)
    runner.drafter.join(worker)
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


def test_another_runner_is_left_alone(runner: Any) -> None:
    other = object.__new__(GPUModelRunner)
    assert other.execute_model(_scheduled()) is None
    assert other.sample_tokens.__func__ is GPUModelRunner.sample_tokens
    assert not hasattr(GPUModelRunner.sample_tokens, "__wrapped__")


def test_one_row_near_its_end_takes_nobodys_drafts(runner: Any) -> None:
    assert runner._input_fits_in_drafter(object()) is True
    assert runner._input_fits_in_drafter(None) is False


@pytest.mark.parametrize(
    ("cores", "launcher", "expected"),
    [
        (SPLIT, os.getppid(), ["take", "sleep", {0, 1}]),
        (None, os.getppid(), ["take", set()]),
        (SPLIT, os.getpid(), [set()]),
    ],
)
def test_only_the_engine_cores_own_process_is_changed_and_its_wait_only_beside_a_draft_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, cores: CoreSplit | None, launcher: int, expected: list[Any]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(engine_core, "take_received_drafts", lambda: calls.append("take"))
    monkeypatch.setattr(engine_core, "sleep_while_waiting", lambda: calls.append("sleep"))
    scheduler = _scheduler(monkeypatch, cores, launcher)
    assert [*calls, scheduler._cores_to_leave] == expected


def test_the_configuration_survives_the_way_to_the_engine_core() -> None:
    config = object.__new__(DoubleSpeculativeConfig)
    config.__dict__.update(cores=SPLIT, launcher=7)
    received = pickle.loads(pickle.dumps(config))
    assert (received.cores, received.launcher) == (SPLIT, 7)


LORA = LoRARequest("french", 1, "/adapters/french")


def _sent(scheduler: Any, *requests: Request) -> list[Any]:
    """What the worker receives of new requests."""
    scheduler.requests = {request.request_id: request for request in requests}
    return list(pickle.loads(pickle.dumps(scheduler.schedule().scheduled_new_reqs)))


def _schedule(self: Any, throttle_prefills: bool = False) -> Any:
    """In place of vLLM's: all requests are new."""
    new = [NewRequestData.from_request(request, ([0],)) for request in self.requests.values()]
    return SimpleNamespace(scheduled_new_reqs=new)


def _params(
    monkeypatch: pytest.MonkeyPatch,
    salt: Any = None,
    double: Any = None,
    lora: LoRARequest | None = None,
    requires_salt: bool = False,
) -> RequestParams:
    """What the worker makes of a request after its way from the scheduler."""
    monkeypatch.setattr(Scheduler, "schedule", _schedule)
    sampling = SamplingParams(max_tokens=10, extra_args={"double": double} if double is not None else None)
    request = Request("r", [1, 2], sampling, None, cache_salt=salt, lora_request=lora)
    proposer = object.__new__(v1.DoubleProposer)
    proposer._max_model_len, proposer._said_unreadable = 100, False
    proposer._requires_salt = requires_salt
    return proposer._params(*_sent(_scheduler(monkeypatch), request), 5)


def test_the_salt_reaches_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _params(monkeypatch).tenant is None
    assert _params(monkeypatch, salt="").tenant is None, "to vLLM, too, this is none"
    assert _params(monkeypatch, lora=LORA).tenant is None
    first, again = (_params(monkeypatch, salt="a").tenant for _ in range(2))
    assert first is not None and first == again


def test_requests_that_differ_in_any_name_have_histories_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_tenants_of_one_salt_and_all_without_one_have_one_owner_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def owner(**said: Any) -> str:
        return (_params(monkeypatch, **said).tenant or "").partition("/")[0]

    a, b = {"tenant": "a"}, {"tenant": "b"}
    assert owner(salt="x", double=a) == owner(salt="x", double=b) == owner(salt="x") != owner(salt="y")
    assert owner(double=a) == owner(double=b) == ""


def test_a_tenant_without_a_salt_is_none_if_the_operator_requires_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _params(monkeypatch, double={"tenant": "a"}, requires_salt=True).tenant is None
    salted = {"salt": "x", "double": {"tenant": "a"}}
    assert _params(monkeypatch, **salted, requires_salt=True).tenant == _params(monkeypatch, **salted).tenant


def test_a_reset_of_the_prefix_cache_reaches_the_draft_before_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def reset(self: Scheduler, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if reset_running_requests:
            raise RuntimeError("half way")
        done.append(("vLLM's", reset_connector))
        return False

    monkeypatch.setattr(Scheduler, "reset_prefix_cache", reset)
    monkeypatch.setattr(Scheduler, "schedule", _schedule)
    scheduler = _scheduler(monkeypatch)
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
        new = _sent(scheduler, *(Request(name, [1, 2], SamplingParams(max_tokens=10), None) for name in ids))
        drafter.follow_step(runner, SimpleNamespace(finished_req_ids=(), scheduled_new_reqs=new, num_scheduled_tokens={}))

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
    monkeypatch.setattr(Worker, "initialize_from_config", lambda self, config: None)
    rank.wrap_worker()
    rank.wrap_worker()
    worker = object.__new__(Worker)
    worker.fails, worker.forgot = False, 0

    def forget() -> None:
        worker.forgot += 1

    drafter = object.__new__(Drafter)
    drafter._proposer = SimpleNamespace(forget_history=forget)
    model = SimpleNamespace(load_weights=lambda weights: set(weights))
    worker.model_runner = SimpleNamespace(drafter=drafter, model=model)
    worker.initialize_from_config("how much there is")
    return worker


class Drafter(rank.TargetRank):
    """A rank that has no runner to change."""


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
    other = object.__new__(Worker)
    other.fails, other.model_runner = False, SimpleNamespace(drafter=object())
    other.initialize_from_config("how much there is")
    assert getattr(other, method)(**arguments) == "done"
    assert worker.forgot == 2 * forgot, "another worker is another's"


def test_history_goes_when_weights_are_loaded_past_vllm(worker: Any) -> None:
    assert worker.forgot == 0
    assert worker.model_runner.model.load_weights(iter(["a"])) == {"a"}
    assert worker.forgot == 1


def test_the_draft_starts_when_the_target_has_warmed_up_and_step_times_are_learnt_anew(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[object, str]] = []
    monkeypatch.setattr(launch, "DraftSupervisor", lambda settings, address: started.append((settings, address)) or object())
    made = object.__new__(launch.Launch)
    made._settings, made._channel, made._supervisor = "settings", SimpleNamespace(address="here"), None  # type: ignore[assignment]
    forgot: list[bool] = []
    drafter = worker.model_runner.drafter
    drafter._launch, drafter._proposer = made, SimpleNamespace(forget_step_cost=lambda: forgot.append(True))
    assert started == []
    for _ in range(2):
        assert worker.compile_or_warm_up_model() == "done"
    assert started == [("settings", "here")] and forgot == [True, True]
