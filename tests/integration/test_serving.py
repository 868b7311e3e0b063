"""The whole thing inside vLLM's engine: float32 greedy texts of double are those of plain vLLM, in every row case of V1."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.llm import (
    MAX_LEN,
    Texts,
    ask,
    begin_with_one_token,
    check_begins,
    count,
    double,
    engine,
    generate,
    prompts,
    sample,
)
from vllm_double.cli import main

pytestmark = pytest.mark.integration


class TestWithDraft:
    """On one engine."""

    @pytest.fixture(scope="class")
    def llm(self) -> Iterator[Any]:
        with engine(double(), worker_extension_cls="tests.integration.probe.Probe") as llm:
            llm.collective_rpc("probe_draft_always")
            yield llm

    def test_texts_are_those_of_plain_vllm(self, plain: Texts, llm: Any) -> None:
        names = ("hits", "accepted_tokens", "request_forwards", "committed_tokens")
        before = {name: sample(f"{name}_total") for name in names}
        assert ask(llm) == plain
        grown = {name: sample(f"{name}_total") - before[name] for name in names}
        # How much is ready in time depends on the machine; that drafts are used at all does not.
        assert grown["committed_tokens"] / grown["request_forwards"] > 1.05
        assert grown["hits"] > 0
        assert grown["accepted_tokens"] > 0

    def test_sampled_requests_are_served(self, llm: Any) -> None:
        from vllm import SamplingParams

        proposed = sample("proposed_tokens_total")
        found = generate(llm, prompts(6), SamplingParams(temperature=1.0, top_p=0.9, top_k=40, max_tokens=48, n=2))
        assert len(found) == 12 and all(0 < len(text) <= 48 for text in found)
        assert sample("proposed_tokens_total") > proposed

    def test_a_request_that_begins_with_one_token_is_given_no_placeholders_to_verify(self, llm: Any) -> None:
        llm.collective_rpc("probe_watch_steps")
        found = begin_with_one_token(llm)
        (steps,) = llm.collective_rpc("probe_steps")
        check_begins(steps)
        assert found == begin_with_one_token(llm, {"enabled": False})

    def test_texts_stay_the_same_when_drafting_is_switched_or_fails_in_the_middle(self, plain: Texts, llm: Any) -> None:
        from vllm import SamplingParams

        server = ["--pid", str(os.getpid())]
        running, texts = llm.llm_engine, {}

        def step() -> None:
            assert running.has_unfinished_requests(), "the texts are too short for this test"
            for output in running.step():
                texts[int(output.request_id)] = list(output.outputs[0].token_ids)

        some = prompts(16)
        asked = ["\n".join(some)[:800], some[0], some[1]]
        params = SamplingParams(temperature=0, max_tokens=MAX_LEN, ignore_eos=True)
        proposed, failures = sample("proposed_tokens_total"), sample("failures_total")
        for number, prompt in enumerate(asked):
            running.add_request(str(number), prompt, params)
        while min(map(len, texts.values()), default=0) < 10 or sample("proposed_tokens_total") == proposed:
            step()
        assert main(["switch", "off", *server, "--reason", "a test"]) == 0
        assert sample("enabled") == 0
        rounds, quiet = -1.0, 0
        while quiet < 15:  # the engine core may have been in a round
            step()
            quiet = quiet + 1 if sample("target_forwards_total") == rounds else 0
            rounds = sample("target_forwards_total")
        assert main(["switch", "on", *server]) == 0
        proposed = sample("proposed_tokens_total")
        while sample("proposed_tokens_total") == proposed:
            step()
        llm.collective_rpc("probe_fail")
        while sample("failures_total") == failures:
            step()
        while running.has_unfinished_requests():
            step()
        deadline = time.monotonic() + 60
        while sample("paused_seconds") and time.monotonic() < deadline:
            time.sleep(0.05)
        proposed = sample("proposed_tokens_total")
        again = generate(llm, asked[1:], params)
        assert sample("proposed_tokens_total") > proposed
        expected = plain["to the model's length"]
        assert [texts[number] for number in range(len(asked))] == expected
        assert again == expected[1:]


def test_texts_stay_the_same_under_preemption_and_chunked_prefill(plain: Texts) -> None:
    settings = {"num_gpu_blocks_override": 8, "max_num_batched_tokens": 160, "enable_prefix_caching": True}
    with engine(double(), **settings) as llm:
        before = count("vllm:num_preemptions")
        assert ask(llm) == plain
        assert count("vllm:num_preemptions") > before
