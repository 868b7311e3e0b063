"""Sampled texts are a function of prompt, parameters and seed: with drafts, without, and while the draft comes and goes."""

import os
import signal
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

from tests.integration.llm import ask_sampled, double, draft_actors, engine, prompts, sample

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    # Chunks of a prompt are skipped by the noise; on a CPU vLLM's own generators cannot.
    settings = {"max_num_batched_tokens": 200, "worker_extension_cls": "tests.integration.probe.Probe"}
    with engine(double(), **settings) as llm:
        llm.collective_rpc("probe_draft_always")
        yield llm
        assert sample("failures_total") == 0


def test_sampled_texts_are_the_same_with_drafts_and_without(llm: Any) -> None:
    expected = ask_sampled(llm, drafts=False)
    before = sample("accepted_tokens_total")
    found = ask_sampled(llm)
    assert sample("accepted_tokens_total") > before + 100, "hardly anything was drafted"
    assert found == expected
    assert len({tuple(text) for text in found["several"]}) == 4
    assert not any(83 in text for text in found["logit_bias"])


def test_requests_without_a_seed_get_seeds_of_their_own(llm: Any) -> None:
    from vllm import SamplingParams

    (output,) = llm.generate(prompts(1), SamplingParams(temperature=1.0, max_tokens=16, n=4), use_tqdm=False)
    assert len({tuple(one.token_ids) for one in output.outputs}) == 4


@pytest.mark.skipif(version("vllm").startswith("0.31"), reason="once is enough: the draft worker is the same on all versions")
def test_texts_stay_the_same_while_the_draft_is_killed_stopped_and_started_again(llm: Any) -> None:
    from vllm import SamplingParams

    def run(disturb: bool) -> dict[str, list[int]]:
        started = llm.llm_engine
        for index, prompt in enumerate(prompts(6)):
            params = SamplingParams(
                temperature=(0.3, 0.7, 1.0)[index % 3], seed=index, max_tokens=150, ignore_eos=True,
                extra_args=None if disturb else {"double": {"enabled": False}},
            )  # fmt: skip
            started.add_request(f"{disturb}-{index}", prompt, params)
        texts: dict[str, list[int]] = {}
        num_steps = 0
        while started.has_unfinished_requests():
            for output in started.step():
                texts[output.request_id.partition("-")[2]] = list(output.outputs[0].token_ids)
            num_steps += 1
            if disturb and num_steps in (10, 20, 30):
                for actor in draft_actors():
                    os.kill(actor.pid, {10: signal.SIGSTOP, 20: signal.SIGCONT, 30: signal.SIGKILL}[num_steps])
        return texts

    expected = run(disturb=False)
    assert draft_actors(), "no draft worker"
    assert run(disturb=True) == expected
    deadline = time.monotonic() + 120
    while sample("worker_up") != 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    before = sample("accepted_tokens_total")
    assert run(disturb=False) == expected and run(disturb=True) == expected
    assert sample("accepted_tokens_total") > before, f"process {os.getpid()}: the new worker drafts nothing"
