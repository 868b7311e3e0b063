"""One rank leads, the others repeat."""

import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.fakes.engine import rows_of
from vllm_double.config import DoubleConfig
from vllm_double.draft import build
from vllm_double.draft.engine.base import Batch, Row
from vllm_double.draft.engine.config import EngineConfig
from vllm_double.draft.engine.ranks import Follower, Meeting
from vllm_double.hosting.settings import DraftSettings
from vllm_double.transport.shared import SharedDraftChannel


class NotingEngine:
    page_size, num_pages, max_length, vocab_size = 4, 8, 64, 10

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def forward(self, batch: Any, num_children: int) -> Any:
        self.calls.append(("forward", rows_of(batch), num_children))
        return np.zeros((len(batch), num_children), np.int32), np.ones((len(batch), num_children), np.float32)

    def copy_slots(self, triples: Any) -> None:
        self.calls.append(("copy_slots", triples))


def test_followers_repeat_the_leaders_calls_and_end_with_it(tmp_path: Path) -> None:
    engines = [NotingEngine() for _ in range(3)]
    meetings = [Meeting(str(tmp_path / "ranks"), rank, 3) for rank in range(3)]
    followers = [
        threading.Thread(target=lambda rank=rank: meetings[rank].follow(engines[rank]).run(lambda: False)) for rank in (1, 2)
    ]
    for follower in followers:
        follower.start()
    leader = meetings[0].lead(engines[0])
    tokens, _ = leader.forward(Batch.of([Row([1, 2], 3, [5, 6], 1, 0.5), Row(range(3, 5), 0, (1,), 0, 0.0)]), 3)
    assert tokens.shape == (2, 3)
    leader.copy_slots([(1, 2, 3)])
    assert (leader.page_size, leader.num_pages, leader.max_length, leader.vocab_size) == (4, 8, 64, 10)
    for connection in leader._followers:
        connection.close()
    for follower in followers:
        follower.join(30)
        assert not follower.is_alive()
    assert engines[1].calls == engines[2].calls == engines[0].calls != []
    assert not (tmp_path / "ranks").exists(), "the socket stays"


@pytest.mark.parametrize(
    ("num_ranks", "devices", "expected"),
    [(1, None, [((2, 3, 4, 5), None)]), (1, "1", [((2, 3, 4, 5), "1")]), (2, "6,7", [((2, 3), "6"), ((4, 5), "7")])],
)
def test_each_rank_has_cores_and_a_device_of_its_own(num_ranks: int, devices: str | None, expected: list[Any]) -> None:
    settings = DraftSettings(draft_cores=(2, 3, 4, 5), num_ranks=num_ranks, visible_devices=devices)
    assert [(settings.cores_of(rank), settings.devices_of(rank)) for rank in range(num_ranks)] == expected
    again = DraftSettings.from_json(settings.to_json())
    assert again == settings
    assert DraftSettings(num_ranks=2).cores_of(1) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_attaches_to_the_logs_and_only_when_all_is_loaded(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The logs have one writer: only the first rank attaches to them, once a forward has loaded what it takes."""

    class Attached(Exception):  # noqa: N818 (reads as what it says)
        pass

    class FakeMeeting:
        file, num_ranks = "a meeting's", 2

        def __init__(self, path: str, rank: int, num_ranks: int) -> None:
            self.rank = rank

        def lead(self, engine: Any) -> Any:
            return engine

        def follow(self, engine: Any) -> Any:
            return Follower(engine, None)  # type: ignore[arg-type]

    def attach(address: str) -> Any:
        # A first one and those that are measured, on all ranks and before the target is waiting for drafts.
        assert len(noting.calls) > 1 and {call for call, *_ in noting.calls} == {"forward"}
        raise Attached

    noting = NotingEngine()

    engine = ModuleType("vllm_double.draft.engine.vllm_engine")  # the real one imports vLLM
    engine.__dict__.update(VllmDraftEngine=lambda config: noting)
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    monkeypatch.setattr(build, "Meeting", FakeMeeting)
    monkeypatch.setattr(SharedDraftChannel, "attach", attach)
    settings = DraftSettings(
        double=DoubleConfig(children_per_node=4, draft_retrieval=False),
        engine=EngineConfig(""),
        num_speculative_tokens=4,
        num_ranks=2,
    )
    if rank > 0:
        assert isinstance(build.build(settings, "", rank, ""), Follower)
    else:
        with pytest.raises(Attached):
            build.build(settings, "", rank, "")
