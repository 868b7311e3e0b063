"""Method double on vLLM's V2 model runner, whose Triton kernels are interpreted here (`make test` says how)."""

import importlib
import itertools
import os
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.llm import (
    Texts,
    ask,
    ask_sampled,
    begin_with_one_token,
    check_begins,
    count,
    double,
    engine,
    generate,
    prompts,
    sample,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter: see the Makefile"),
]

SWITCH = "VLLM_USE_V2_MODEL_RUNNER"


ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
WITHOUT = {"double": {"enabled": False}}


SETTINGS = {"num_gpu_blocks_override": 8, "max_num_batched_tokens": 160, "enable_prefix_caching": True}


@pytest.fixture(scope="module")
def plain_sampled() -> Texts:
    """Sampled texts of plain vLLM on V2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1")
        with engine(None, worker_extension_cls="tests.integration.probe.Probe", **SETTINGS) as llm:
            llm.collective_rpc("probe_masks_of_int")
            llm.collective_rpc("probe_filters_in_torch")
            return ask_sampled(llm, num_prompts=1, longest=10, singly=False)


class TestOnV2:
    """On one engine: to start it under the interpreter takes a minute."""

    @pytest.fixture(scope="class")
    def llm(self, plain_sampled: Texts) -> Iterator[Any]:
        settings = SETTINGS
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SWITCH, "1")
            with engine(double(), worker_extension_cls="tests.integration.probe.Probe", **settings) as llm:
                assert llm.collective_rpc("probe_runner") == ["vllm.v1.worker.cpu.model_runner"]
                llm.collective_rpc("probe_draft_always")
                llm.collective_rpc("probe_masks_of_int")
                llm.collective_rpc("probe_filters_in_torch")
                llm.collective_rpc("probe_watch_steps")
                yield llm
                assert sample("failures_total") == 0

    @pytest.fixture(scope="class")
    def found(self, llm: Any) -> Texts:
        before = count("vllm:num_preemptions")
        texts = ask(llm)
        assert count("vllm:num_preemptions") > before, "there was room for all"
        return texts

    def test_texts_are_those_of_plain_vllm_on_v1(self, plain: Texts, found: Texts) -> None:
        """In every row case, under preemption and chunked prefill."""
        assert sample("accepted_tokens_total") > 0
        assert sample("committed_tokens_total") / sample("request_forwards_total") > 1.05
        assert found == plain

    def test_sampled_texts_are_those_of_plain_vllm_on_v2(self, plain_sampled: Texts, llm: Any) -> None:
        accepted = count(ACCEPTED)
        found = ask_sampled(llm, num_prompts=1, longest=10, singly=False)
        for name, texts in plain_sampled.items():
            assert found[name] == texts, name
        assert count(ACCEPTED) > accepted + 10, "hardly anything was drafted"

    def test_drafts_of_sampled_requests_are_accepted(self, llm: Any) -> None:
        from vllm import SamplingParams

        accepted = count(ACCEPTED)
        for _ in range(5):  # on a busy machine there may be no drafts in time
            texts = generate(llm, prompts(2), SamplingParams(temperature=0.7, max_tokens=32, n=2))
            assert len(texts) == 4 and all(0 < len(text) <= 32 for text in texts)
            if count(ACCEPTED) > accepted:
                return
        pytest.fail("none was accepted")

    def test_a_row_without_drafts_is_not_padded(self, llm: Any) -> None:
        """Whether it declined them, or they do not pay."""
        from vllm import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, extra_args=args) for args in (WITHOUT, None)]
        llm.collective_rpc("probe_steps")
        declined = self._side_by_side(llm, params)
        llm.collective_rpc("probe_cut_the_first", args=(True,))
        try:
            unprofitable = self._side_by_side(llm, params[1])
        finally:
            llm.collective_rpc("probe_cut_the_first", args=(False,))
        for decoding in (declined, unprofitable):
            for step in decoding:
                numbers = sorted(map(len, step["drafts"].values()))
                assert numbers[0] == 0, "drafts for who is to have none"
                assert step["device"] == {
                    "tokens": 2 + numbers[1],
                    "padded": 2 + numbers[1],
                    "drafts": step["device"]["drafts"],
                }
                assert sorted(step["device"]["drafts"]) == numbers

    @staticmethod
    def _side_by_side(llm: Any, params: Any) -> list[dict[str, Any]]:
        """Steps of two requests, one of which has drafts."""
        for _ in range(5):  # on a busy machine there may be no drafts in time
            generate(llm, prompts(3)[1:], params)
            (steps,) = llm.collective_rpc("probe_steps")
            if decoding := [step for step in steps if len(step["drafts"]) == 2 and any(step["drafts"].values())]:
                return decoding
        pytest.fail("the two never ran side by side")

    def test_a_request_that_begins_with_one_token_is_given_no_placeholders_to_verify(self, llm: Any) -> None:
        llm.collective_rpc("probe_steps")
        texts = begin_with_one_token(llm)
        (steps,) = llm.collective_rpc("probe_steps")
        check_begins(steps)
        assert texts == begin_with_one_token(llm, {"enabled": False})


# Without an engine


@pytest.fixture
def v2() -> Any:
    """The adapter's module."""
    return importlib.import_module("vllm_double.integration.v2")


class FakeProposer:
    """Notes what it is told; proposes the last token again, as often as its text is odd."""

    def __init__(self) -> None:
        self.admitted: dict[str, list[int]] = {}
        self.finished: list[str] = []
        self.step_cost = SimpleNamespace(observe=lambda tokens, seconds: None)

    def admit(self, request_id: str, tokens: Any, params: Any) -> None:
        self.admitted[request_id] = tokens.tolist()

    def finish(self, request_id: str) -> None:
        self.finished.append(request_id)

    def guard(self) -> Any:
        return nullcontext()

    def propose(self, batch: Any) -> list[list[int]]:
        rows, texts = batch.rows, [batch.text(row).tolist() for row in range(len(batch.request_ids))]
        starts = rows.verified_starts.tolist()
        verified = [rows.verified[start:end].tolist() for start, end in itertools.pairwise(starts)]
        self.rows = list(zip(batch.request_ids, texts, rows.num_sampled.tolist(), verified, strict=True))
        return [text[-1:] * (len(text) % 2) for text in texts]


def speculator(module: Any, proposer: Any) -> Any:
    from vllm_double.integration.rank import TargetRank

    made = object.__new__(module.DoubleSpeculator)
    made.__dict__.update(
        _proposer=proposer, _num_resets=0, _max_model_len=64, _seeds={}, _num_tokens=3, _texts=module._Texts(), _step=None,
        _drafts=None, _step_started=0.0, _device=torch.device("cpu"),
    )  # fmt: skip
    assert isinstance(made, TargetRank)
    return made


def scheduled(new: dict[str, list[int]], drafts: dict[str, list[int]], finished: tuple[str, ...] = ()) -> Any:
    from vllm.sampling_params import SamplingParams

    requests = [
        SimpleNamespace(
            req_id=name, prefill_token_ids=tokens, prompt_token_ids=tokens[:2], prompt_len=2, prompt_embeds=None,
            sampling_params=SamplingParams(max_tokens=10), lora_request=None, mm_features=[],
        )
        for name, tokens in new.items()
    ]  # fmt: skip
    return SimpleNamespace(
        finished_req_ids=finished, scheduled_new_reqs=requests, scheduled_spec_decode_tokens=drafts,
        total_num_scheduled_tokens=0,
    )  # fmt: skip


def states(*ids: str) -> Any:
    index = {name: place for place, name in enumerate(ids)}
    return SimpleNamespace(req_id_to_index=index, draft_tokens=torch.full((len(ids) + 1, 3), 77))


def runner_with(req_states: Any) -> Any:
    seeds = SimpleNamespace(np=np.arange(10, dtype=np.int64))
    return SimpleNamespace(req_states=req_states, sampler=SimpleNamespace(sampling_states=SimpleNamespace(seeds=seeds)))


def output(**sampled: list[int]) -> Any:
    return SimpleNamespace(req_ids=list(sampled), sampled_token_ids=list(sampled.values()))


def test_what_vllm_writes_into_stands_there_in_the_next_step(v2: Any) -> None:
    made = speculator(v2, FakeProposer())
    for num_requests in (2, 1):
        found = made.propose(SimpleNamespace(num_reqs=num_requests), "what vLLM passes", num_speculative_tokens=2)
        assert found.dtype == torch.int64 and found.tolist() == [[0, 0, 0]] * num_requests
        found[:, 2:] = -1  # as vLLM's runner does where fewer are to be scheduled


def test_the_forward_reads_what_was_scheduled(v2: Any) -> None:
    made, device = speculator(v2, FakeProposer()), states("a", "b", "c")
    made.follow_step(runner_with(device), scheduled({}, {"c": [5, 6], "a": [-1, -1, -1]}))
    assert device.draft_tokens.tolist() == [[0, 0, 0], [77, 77, 77], [5, 6, 0], [77, 77, 77]]


def test_chains_are_ragged_and_handed_over_once(v2: Any) -> None:
    made = speculator(v2, FakeProposer())
    made.follow_step(runner_with(states("a", "b")), scheduled({"a": [1, 2], "b": [1, 2, 3]}, {}))
    drafts = made.propose_rows(output(b=[4, 9], a=[7]))
    assert (drafts.req_ids, drafts.draft_token_ids) == (["b", "a"], [[9], [7]])
    assert made._proposer.rows == [("b", [1, 2, 3, 4, 9], 2, []), ("a", [1, 2, 7], 1, [])]
    assert made.take_drafts() is drafts and made.take_drafts() is None


def test_a_request_that_was_preempted_is_admitted_anew_only_with_another_text(v2: Any) -> None:
    proposer = FakeProposer()
    made, runner = speculator(v2, proposer), runner_with(states("a"))
    made.follow_step(runner, scheduled({"a": [1, 2]}, {}))
    made.propose_rows(output(a=[7]))
    proposer.admitted.clear()
    made.follow_step(runner, scheduled({"a": [1, 2, 7]}, {}))
    assert proposer.admitted == {}
    made.propose_rows(output(a=[8]))
    made.follow_step(runner, scheduled({"a": [1, 2, 8]}, {}))
    assert proposer.admitted == {"a": [1, 2, 8]}
    made.follow_step(runner, scheduled({}, {}, finished=("a",)))
    assert proposer.finished == ["a"] and made._texts.rows == {}


def test_a_request_whose_text_got_lost_goes_without_drafts_and_others_with(v2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proposer = FakeProposer()
    proposer.guard = lambda: suppress(Exception)  # type: ignore[method-assign]
    made, runner, start = speculator(v2, proposer), runner_with(states("a", "b")), v2._Texts.start

    def lose_one(texts: Any, request_id: str, tokens: Any) -> None:
        if request_id == "b":
            raise RuntimeError("something of ours")
        start(texts, request_id, tokens)

    monkeypatch.setattr(v2._Texts, "start", lose_one)
    made.follow_step(runner, scheduled({"a": [1, 2]}, {}))
    made.follow_step(runner, scheduled({"b": [1, 2, 3]}, {}))
    drafts = made.propose_rows(output(a=[7], b=[4]))
    assert drafts.draft_token_ids[0] == [7] and [row[::2] for row in proposer.rows] == [("a", 1), ("b", 0)]
    assert list(proposer.admitted) == ["a"]


def test_a_rank_that_does_not_propose_keeps_no_texts_and_verifies_the_same(v2: Any) -> None:
    made, device = speculator(v2, None), states("a")
    made.follow_step(runner_with(device), scheduled({"a": [1, 2]}, {"a": [5]}))
    assert device.draft_tokens[0].tolist() == [5, 0, 0] and made._texts.rows == {}
    assert made.propose_rows(output(a=[7])).draft_token_ids == [[]]


def test_texts_come_whole_however_many_and_long_they_are(v2: Any) -> None:
    texts, expected = v2._Texts(), {}
    for number in range(600):
        name = str(number % 29)
        if name not in expected:
            texts.start(name, [1, 2])
            expected[name] = [1, 2]
        elif number % 97 == 5:
            texts.stop(name)
            del expected[name]
            continue
        new = [number] * (number % 300)
        texts.extend(name, new)
        expected[name] += new
    assert texts.buffer.flags.c_contiguous and texts.lengths.dtype == np.int32
    assert {name: texts.tokens(name).tolist() for name in expected} == expected
    texts.stop("never seen")


def test_our_own_runner_alone_is_changed(v2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2.GPUModelRunner, "update_requests", lambda self, scheduled: "updated")
    monkeypatch.setattr(v2.GPUModelRunner, "execute_model", lambda self, scheduled, dummy_run=False: None)
    monkeypatch.setattr(v2.GPUModelRunner, "sample_tokens", lambda self, grammar: "sampled")
    monkeypatch.setattr(v2.GPUModelRunner, "take_draft_token_ids", lambda self: "vLLM's")
    ours, other = (object.__new__(v2.GPUModelRunner) for _ in range(2))
    ours.model, ours.rejection_sampler = SimpleNamespace(load_weights=None), None
    ours.sampler = SimpleNamespace(use_flashinfer=True, use_xpu_sampler=True)
    ours.speculator = speculator(v2, None)
    worker = object.__new__(importlib.import_module("vllm.v1.worker.gpu_worker").Worker)
    worker.model_runner = ours
    ours.speculator.join(worker)
    assert not ours.sampler.use_flashinfer and not ours.sampler.use_xpu_sampler
    assert other.update_requests(scheduled({}, {})) == "updated"
    assert other.execute_model(SimpleNamespace(has_structured_output_requests=False)) is None
    assert other.sample_tokens(None) == "sampled"
    assert other.take_draft_token_ids() == "vLLM's"
    assert ours.take_draft_token_ids() is None
    assert ours.execute_model(SimpleNamespace(has_structured_output_requests=False), dummy_run=True) is None
    assert ours.execute_model(SimpleNamespace(has_structured_output_requests=True)) is None
    assert ours.execute_model(SimpleNamespace(has_structured_output_requests=False)) == "sampled"


@pytest.mark.parametrize(("choice", "on_v2"), [(None, True), ("1", True), ("0", False)])
def test_vllms_choice_of_its_runner_is_followed(monkeypatch: pytest.MonkeyPatch, choice: str | None, on_v2: bool) -> None:
    from tests.integration.test_refusals import NGRAM, create

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    if choice is None:
        monkeypatch.delenv(SWITCH, raising=False)
    else:
        monkeypatch.setenv(SWITCH, choice)
    config: Any = create({})
    assert config.use_v2_model_runner is on_v2
    unsupported = type(config)._get_v2_model_runner_unsupported_features
    assert unsupported.__wrapped__(config) != unsupported(config) == []
    ngram: Any = create(NGRAM)
    assert unsupported(ngram) == unsupported.__wrapped__(ngram)


def test_vllm_chooses_runner_and_speculator_of_other_methods_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu import spec_decode

    from vllm_double.integration import front_end

    class Ours:
        pass

    built = lambda config, device, *args: "vLLM's"  # noqa: E731
    monkeypatch.setattr(spec_decode, "init_speculator", built)
    features = lambda self: ["speculative method 'custom_class'", "dual batch overlap"]  # noqa: E731
    monkeypatch.setattr(VllmConfig, "_get_v2_model_runner_unsupported_features", features)
    front_end.allow_v2(Ours)
    front_end.allow_v2(Ours)
    made = importlib.import_module("vllm_double.integration.v2")
    monkeypatch.setattr(made, "DoubleSpeculator", lambda config, device: "ours")
    for speculative, unsupported, speculator_ in (
        (Ours(), ["dual batch overlap"], "ours"),
        (SimpleNamespace(method="custom_class"), features(None), "vLLM's"),
        (None, features(None), "vLLM's"),
    ):
        config = object.__new__(VllmConfig)
        object.__setattr__(config, "speculative_config", speculative)
        assert config._get_v2_model_runner_unsupported_features() == unsupported
        assert spec_decode.init_speculator(config, "cpu") == speculator_
