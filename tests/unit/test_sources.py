"""The settings that bound what sources keep."""

import numpy as np
import pytest

from vllm_double.config import DoubleConfig
from vllm_double.retrieval import ContextRetriever, HistoryRetriever
from vllm_double.retrieval.sources import Sources

BOUND = 1 << 20


def test_indexes_of_running_requests_take_no_more_memory_than_set_and_what_finds_no_room_is_counted() -> None:
    double = DoubleConfig(context_gib=BOUND / 2**30, history_tokens=0)
    sources = Sources.of(double, ()).open()
    most = 0
    for key in range(60):
        for source in sources:
            source.start(key, np.arange(100, dtype=np.int32), None)
        for _ in range(10):
            for source in sources:
                source.extend(key, list(range(30)))
                source.work(1 << 12)
            most = max(most, sum(source.num_bytes for source in sources))
    assert BOUND / 2 < most <= BOUND
    assert sum(source.num_unindexed for source in sources) > 0
    for key in range(60):
        for source in reversed(sources):
            source.stop(key, False)
    sources[0].work(1 << 20)
    assert sum(source.num_bytes for source in sources) == 0


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_quotas_are_as_set(share: float) -> None:
    sources = Sources.of(DoubleConfig(tenant_share=share, history_tokens=400), ()).open()
    (past,) = (source for source in sources if isinstance(source, HistoryRetriever))
    assert past._quota == share * 400 and isinstance(sources[0], ContextRetriever) and past.arena is sources[0].arena
