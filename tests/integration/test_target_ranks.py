"""A target on two ranks: both verify the chains of the one that proposes. On V1, or on V2 where Triton is interpreted."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chaos.chaos import Process, possessions, still_there, wait_for
from tests.integration.llm import descendants, double, draft_actors, engine, generate, prompts, sample

CORES = sorted(os.sched_getaffinity(0))[:2]
ON_V2 = os.environ.get("TRITON_INTERPRET") == "1"
BIND = "|".join(map(str, CORES))

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(len(CORES) < 2, reason="two ranks need two cores"),
]


def ask(llm: Any, drafts: bool = True) -> list[list[int]]:
    from vllm import SamplingParams

    some = prompts(6)
    args = None if drafts else {"double": {"enabled": False}}
    settings = [SamplingParams(temperature=0, max_tokens=number, extra_args=args) for number in (12, 16, 24)] * 2
    return generate(llm, some, settings) + generate(llm, some[:1], settings[:1])


class TestTwoRanks:
    """On one engine, which the last test ends."""

    @pytest.fixture(scope="class")
    def others(self) -> set[int]:
        return {process.pid for process in descendants()}

    @pytest.fixture(scope="class")
    def plain(self) -> list[list[int]] | None:
        """Texts of plain vLLM on two ranks of V1; not where to start one engine more takes a minute."""
        if ON_V2:
            return None
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
            with engine(None, BIND, tensor_parallel_size=2) as llm:
                return ask(llm)

    @pytest.fixture(scope="class")
    def llm(self, plain: list[list[int]] | None, others: set[int]) -> Iterator[Any]:
        settings = {"tensor_parallel_size": 2, "worker_extension_cls": "tests.integration.probe.Probe"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(ON_V2)))
            with engine(double(), BIND, **settings) as llm:
                llm.collective_rpc("probe_draft_always")
                yield llm

    def test_one_rank_alone_has_a_draft(self, llm: Any) -> None:
        assert llm.collective_rpc("probe_runner") == [f"vllm.v1.worker.cpu{'.' if ON_V2 else '_'}model_runner"] * 2
        assert llm.collective_rpc("probe_proposes") == llm.collective_rpc("probe_launches") == [True, False]
        assert len(draft_actors()) == 1

    def test_texts_on_two_ranks_are_those_of_plain_vllm(self, llm: Any, plain: list[list[int]] | None) -> None:
        declined = ask(llm, drafts=False)
        assert plain in (None, declined)
        assert sample("accepted_tokens_total") == 0
        assert ask(llm) == declined
        assert sample("accepted_tokens_total") > 0
        assert sample("failures_total") == 0

    def test_the_ranks_verify_and_sample_the_same(self, llm: Any) -> None:
        """Sampled, too: the ranks draw alike as long as nothing of ours draws in one of them."""
        from vllm import SamplingParams

        llm.collective_rpc("probe_watch_steps")
        for _ in range(5):  # on a busy machine there may be no drafts in time
            generate(llm, prompts(6), SamplingParams(temperature=0.7, max_tokens=24))
            first, second = llm.collective_rpc("probe_steps")
            assert first == second
            if was_verified := any(any(step["drafts"].values()) for step in first):
                break
        assert was_verified, "nothing was verified"

    def test_nothing_stays_when_one_rank_is_killed(self, llm: Any, others: set[int]) -> None:
        """The first on V1, the second on V2. No request runs: vLLM's LLM would wait for it for ever."""
        ours = [process for process in descendants() if process.pid not in others]
        assert {"engine", "worker", "actor", "raylet"} <= {process.role for process in ours}
        # vLLM's own queues are removed by multiprocessing's tracker, which ends with the front end: here that is pytest.
        owned = {path for path in possessions(ours) if not path.startswith("/dev/shm/psm_")}
        assert owned, "nothing could stay"
        (rank,) = (process for process in ours if f"VLLM::Worker_TP{int(ON_V2)}" in process.command)
        os.kill(rank.pid, signal.SIGKILL)
        left: list[Process] = []

        def gone() -> bool:
            left[:] = [process for process in ours if process.alive()]
            return not left and not still_there(owned)

        wait_for(gone, 30, lambda: f"still there: {left}, {still_there(owned)}")
