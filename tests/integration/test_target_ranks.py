"""A target on two ranks: both verify the chains of the one that proposes. On V1, or on V2 where Triton is interpreted."""

import os
from typing import Any

import pytest

from tests.integration.llm import double, engine, generate, prompts, sample

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
    return generate(llm, some, settings) + generate(llm, some[:1], settings[:1])


def test_two_ranks_verify_the_chains_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    on_v2 = os.environ.get("TRITON_INTERPRET") == "1"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(on_v2)))

    settings = {"tensor_parallel_size": 2, "worker_extension_cls": "tests.integration.probe.Probe"}
    with engine(double(), "|".join(map(str, CORES)), **settings) as llm:
        assert llm.collective_rpc("probe_runner") == [f"vllm.v1.worker.cpu{'.' if on_v2 else '_'}model_runner"] * 2
        assert llm.collective_rpc("probe_proposes") == [True, False]
        plain = ask(llm, drafts=False)
        assert sample("accepted_tokens_total") == 0
        assert ask(llm, drafts=True) == plain
        assert sample("accepted_tokens_total") > 0
        assert sample("failures_total") == 0
