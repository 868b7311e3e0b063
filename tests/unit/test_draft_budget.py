from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from tests.fakes.engine import FakeEngine, hashed_logits
from vllm_double.draft.engine.base import Batch
from vllm_double.draft.forward_budget import MAX_NODES, measured_nodes


class TimedEngine(FakeEngine):
    """Whose forwards take as long as ``cost`` says, of their rows and their number."""

    def __init__(self, cost: Callable[[int, int], float], num_pages: int = 64) -> None:
        super().__init__(hashed_logits(16), vocab_size=16, num_pages=num_pages)
        self.now = 0.0
        self._cost = cost

    def forward(self, batch: Batch, num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        self.now += self._cost(len(batch), self.num_forwards)
        return super().forward(batch, num_children)

    def nodes(self) -> int:
        return measured_nodes(self, 4, clock=lambda: self.now)


def small_model_on_a_core(rows: int) -> float:
    return 1e-3 * {1: 0.49, 2: 0.52, 4: 0.57, 8: 0.67, 16: 0.90, 32: 1.40}[rows]


@pytest.mark.parametrize(
    ("cost", "nodes"),
    [(small_model_on_a_core, 8), (lambda rows: 1e-3, MAX_NODES), (lambda rows: 1e-3 * rows, 1)],
    ids=["a core", "free rows", "dear rows"],
)
def test_a_forward_takes_as_many_nodes_as_cost_little_more_than_one(cost: Callable[[int], float], nodes: int) -> None:
    assert TimedEngine(lambda rows, number: cost(rows)).nodes() == nodes


@pytest.mark.parametrize("phase", range(3))
def test_what_else_runs_on_the_core_changes_nothing(phase: int) -> None:
    # Two thirds of all forwards are disturbed, the others tell.
    def cost(rows: int, number: int) -> float:
        turn = number // 6 + number
        return small_model_on_a_core(rows) + (0.0 if turn % 3 == phase else 5e-3)

    assert TimedEngine(cost).nodes() == 8


def test_a_small_cache_bounds_what_is_measured() -> None:
    assert TimedEngine(lambda rows, number: 1e-3, num_pages=5).nodes() == 4
