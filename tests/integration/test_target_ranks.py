"""A target on two ranks: both verify the chains of the one that proposes. On V1, or on V2 where Triton is interpreted."""

import os
from typing import Any

import pytest

from tests.integration.test_serving import Texts, double, prompts, sample, with_engine

CORES = sorted(os.sched_getaffinity(0))[:2]

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(len(CORES) < 2, reason="two ranks need two cores"),
]


def ask(llm: Any, drafts: bool) -> list[list[int]]:
    from vllm import SamplingParams

    some = prompts(6)
    args = None if drafts else {"double": {"enabled": False}}
    settings = [SamplingParams(temperature=0, max_tokens=number, extra_args=args) for number in (12, 16, 24)] * 2
    outputs = llm.generate(some, settings, use_tqdm=False) + llm.generate(some[:1], settings[:1], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_two_ranks_verify_the_chains_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    on_v2 = os.environ.get("TRITON_INTERPRET") == "1"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(on_v2)))

    def use(llm: Any) -> Texts:
        assert llm.collective_rpc("probe_runner") == [f"vllm.v1.worker.cpu{'.' if on_v2 else '_'}model_runner"] * 2
        assert llm.collective_rpc("probe_proposes") == [True, False]
        plain = ask(llm, drafts=False)
        assert sample("accepted_tokens_total") == 0
        drafted = ask(llm, drafts=True)
        assert sample("accepted_tokens_total") > 0
        assert sample("failures_total") == 0
        return {"plain": plain, "drafted": drafted}

    texts = with_engine(
        double(), use, "|".join(map(str, CORES)), tensor_parallel_size=2, worker_extension_cls="tests.integration.probe.Probe"
    )
    assert texts["drafted"] == texts["plain"]
