"""The whole thing inside vLLM's engine: float32 greedy texts of double are those of plain vLLM, in every row case of V1."""

import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from vllm_double.cli import main

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PAIR = ROOT / "benchmarks/pair"
MAX_LEN = 384
Texts = dict[str, list[list[int]]]


def prompts(count: int) -> list[str]:
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def with_engine(speculative: dict[str, Any] | None, use: Callable[[Any], Texts], bind: str = "auto", **arguments: Any) -> Texts:
    """What ``use`` gives on a fresh engine, with drafts ready where there is a draft model. bind: cores of its ranks."""
    from vllm import LLM

    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bind
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": MAX_LEN, "max_num_seqs": 8} | arguments
    llm = LLM(str(PAIR / "target"), speculative_config=speculative, disable_log_stats=False, **settings)
    try:
        if speculative is not None and "model" in speculative:
            deadline = time.monotonic() + 180
            while not sample("worker_up") and time.monotonic() < deadline:
                time.sleep(0.1)
            assert sample("worker_up") == 1, "no draft worker"
        return use(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def sample(name: str) -> float:
    """The newest engine's value of one of our metrics."""
    found = 0.0
    for family in REGISTRY.collect():
        for one in family.samples:
            if one.name == f"vllm:double_{name}":
                found = one.value
    return found


def ask(llm: Any) -> Texts:
    """Texts under every condition of a row that V1 knows."""
    from vllm import SamplingParams

    def run(texts: list[str], *params: SamplingParams) -> list[list[int]]:
        outputs = llm.generate(texts, list(params) * (len(texts) // len(params)), use_tqdm=False)
        return [list(one.token_ids) for output in outputs for one in output.outputs]

    some = prompts(16)
    long = "\n".join(some)[:800]
    until_full = SamplingParams(temperature=0, max_tokens=MAX_LEN, ignore_eos=True)
    return {
        "one by one": [text for prompt in some[:3] for text in run([prompt], SamplingParams(temperature=0, max_tokens=64))],
        "batch": run(some, SamplingParams(temperature=0, max_tokens=48), SamplingParams(temperature=0, max_tokens=20)),
        "few tokens": run(
            some[:6],
            SamplingParams(temperature=0, max_tokens=1),
            SamplingParams(temperature=0, max_tokens=2),
            SamplingParams(temperature=0, max_tokens=3),
        ),
        "to the model's length": run([long, some[0], some[1]], until_full),
        "prefix cached": run([long, long + "\n"], SamplingParams(temperature=0, max_tokens=24)),
        "penalties": run(some[:4], SamplingParams(temperature=0, max_tokens=40, repetition_penalty=1.2)),
        # vLLM looks for stop strings in text, step by step: tokens that came in the same step stay on the list.
        "stop string": [
            [ord(character) for character in one.text]
            for output in llm.generate(some[:4], SamplingParams(temperature=0, max_tokens=40, stop=["return"]), use_tqdm=False)
            for one in output.outputs
        ],
        "logprobs": run(some[:2], SamplingParams(temperature=0, max_tokens=24, logprobs=2)),
        "seeded": [
            text for seed in (1, 2) for text in run([some[0]], SamplingParams(temperature=0.8, max_tokens=32, seed=seed))
        ],
    }


def double(**extra: Any) -> dict[str, Any]:
    return {"method": "double", "model": str(PAIR / "draft"), "num_speculative_tokens": 12} | extra


@pytest.fixture(scope="module")
def plain() -> Texts:
    return with_engine(None, ask)


def test_texts_differ_from_plain_vllm(plain: Texts) -> None:
    counts: dict[str, float] = {}

    def use(llm: Any) -> Texts:
        found = ask(llm)
        counts.update({name: sample(name) for name in ("hits_total", "harvests_total", "accepted_tokens_total")})
        counts["forwards"] = sample("request_forwards_total")
        counts["tokens"] = sample("committed_tokens_total")
        return found

    assert with_engine(double(), use) == plain
    # How much is ready in time depends on the machine; that drafts are used at all does not.
    assert counts["tokens"] / counts["forwards"] > 1.05
    assert counts["hits_total"] / counts["harvests_total"] > 0.1


def test_texts_change_when_drafting_is_switched_or_fails_in_the_middle(plain: Texts) -> None:
    from vllm import SamplingParams

    server = ["--pid", str(os.getpid())]

    def use(llm: Any) -> Texts:
        engine, texts = llm.llm_engine, {}

        def step() -> None:
            assert engine.has_unfinished_requests(), "the texts are too short for this test"
            for output in engine.step():
                texts[int(output.request_id)] = list(output.outputs[0].token_ids)

        some = prompts(16)
        asked = ["\n".join(some)[:800], some[0], some[1]]
        params = SamplingParams(temperature=0, max_tokens=MAX_LEN, ignore_eos=True)
        for number, prompt in enumerate(asked):
            engine.add_request(str(number), prompt, params)
        while min(map(len, texts.values()), default=0) < 10 or not sample("proposed_tokens_total"):
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
        while not sample("failures_total"):
            step()
        while engine.has_unfinished_requests():
            step()
        deadline = time.monotonic() + 60
        while sample("paused_seconds") and time.monotonic() < deadline:
            time.sleep(0.05)
        proposed = sample("proposed_tokens_total")
        again = llm.generate(asked[1:], params, use_tqdm=False)
        assert sample("proposed_tokens_total") > proposed
        found = [texts[number] for number in range(len(asked))]
        return {"to the model's length": found, "again": [list(output.outputs[0].token_ids) for output in again]}

    found = with_engine(double(), use, worker_extension_cls="tests.integration.probe.Probe")
    expected = plain["to the model's length"]
    assert found == {"to the model's length": expected, "again": expected[1:]}


def test_texts_with_retrieval_alone_differ_from_plain_vllm(plain: Texts) -> None:
    speculative = double()
    del speculative["model"]
    assert with_engine(speculative, ask) == plain


def test_texts_differ_under_preemption_and_chunked_prefill(plain: Texts) -> None:
    def use(llm: Any) -> Texts:
        return ask(llm)

    found = with_engine(double(), use, num_gpu_blocks_override=8, max_num_batched_tokens=160, enable_prefix_caching=True)
    assert found == plain


def test_sampled_requests_are_served() -> None:
    from vllm import SamplingParams

    def use(llm: Any) -> Texts:
        params = SamplingParams(temperature=1.0, top_p=0.9, top_k=40, max_tokens=48, n=2)
        outputs = llm.generate(prompts(6), params, use_tqdm=False)
        texts = [list(one.token_ids) for output in outputs for one in output.outputs]
        assert sample("proposed_tokens_total") > 0
        return {"sampled": texts}

    found = with_engine(double(), use)["sampled"]
    assert len(found) == 12 and all(0 < len(text) <= 48 for text in found)
