"""Tensor parallelism: one rank has all that proposes, every rank verifies the same chains."""

import multiprocessing
from typing import Any

import psutil
import pytest

from tests.integration.test_serving import Texts, ask, double, sample, with_engine

pytestmark = pytest.mark.integration

NAMES = ("batch", "few tokens", "to the model's length", "prefix cached", "penalties")


def on_two_ranks(speculative: dict[str, Any] | None, use: Any, **arguments: Any) -> Texts:
    found = with_engine(speculative, use, bind="0|1", tensor_parallel_size=2, **arguments)
    return {name: found[name] for name in NAMES}


def num_draft_workers() -> int:
    mine = psutil.Process().children(recursive=True)
    return sum("ray::DraftActor" in " ".join(process.cmdline()) for process in mine if process.is_running())


@pytest.mark.skipif((multiprocessing.cpu_count() or 1) < 2, reason="a core to a rank")
def test_texts_of_two_ranks_differ_or_both_propose() -> None:
    def use(llm: Any) -> Texts:
        assert llm.collective_rpc("probe_proposes") == [True, False]
        assert num_draft_workers() == 1
        found = ask(llm)
        assert sample("accepted_tokens_total") > 0
        assert sample("failures_total") == 0
        return found

    assert on_two_ranks(double(), use, worker_extension_cls="tests.integration.probe.Probe") == on_two_ranks(None, ask)
