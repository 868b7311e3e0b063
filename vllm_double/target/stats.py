"""What the target's side counts; the metrics page shows it. Plain numbers, added to on the hot path."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["PROPOSE_BUCKETS_S", "Counters", "Tally"]

PROPOSE_BUCKETS_S = (50e-6, 100e-6, 200e-6, 300e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)
_COUNTS = np.dtype(
    [
        ("rows", "i8"),
        ("rows_without_drafts", "i8"),
        ("committed_tokens", "i8"),
        ("lookups", "i8"),
        ("hits", "i8"),
        ("late_nodes", "i8"),
        ("nodes_evicted", "i8"),  # for lack of room
        ("draft_pauses", "i8"),
        ("draft_first_examples", "i8"),
        ("draft_first_accepted", "i8"),
        ("draft_listed_accepted", "i8"),
        ("proposed_tokens", "i8"),
        ("expected_tokens", "f8"),  # of the proposed ones, those that should be accepted if the calibration is right
    ]
)


class Tally(NamedTuple):
    """What compiled steps count."""

    counts: npt.NDArray[np.void]
    """[1]"""
    offered: npt.NDArray[np.int64]
    """[sources]: verified draft tokens."""
    accepted: npt.NDArray[np.int64]
    """[sources]"""


@dataclass(slots=True)
class Counters:
    """Monotone counts since the start, but for ``worker``, which is the worker's own last report.

    Those of ``tally`` are attributes, too: rows are request rows that a target forward sampled for, those without draft tokens
    included. A *lookup* is a row that wanted drafts; it is a *hit* if something was ready behind its last token.
    draft_first_examples: committed tokens for which it is known what the draft had listed; of these draft_first_accepted were
    the first of the list, draft_listed_accepted among the three that are sent.
    """

    sources: tuple[str, ...] = ("draft",)
    rounds: int = 0
    rewinds: int = 0
    resynchronisations: int = 0
    rounds_without_worker: int = 0
    texts_too_long: int = 0
    failures: int = 0
    losses: int = 0
    waits: int = 0
    waits_missed: int = 0
    wait_seconds: float = 0.0
    propose_seconds: float = 0.0
    propose_max_seconds: float = 0.0
    propose_buckets: list[int] = field(default_factory=lambda: [0] * (len(PROPOSE_BUCKETS_S) + 1))
    worker: dict[str, float] = field(default_factory=dict)
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        num_sources = len(self.sources)
        self.tally = Tally(np.zeros(1, _COUNTS), np.zeros(num_sources, np.int64), np.zeros(num_sources, np.int64))

    def __getattr__(self, name: str) -> Any:
        if name not in (_COUNTS.names or ()):
            raise AttributeError(name)
        return self.tally.counts[name][0].item()

    @property
    def offered(self) -> dict[str, int]:
        """Verified draft tokens by source."""
        return self._by_source(self.tally.offered)

    @property
    def accepted(self) -> dict[str, int]:
        """Those of them that were accepted."""
        return self._by_source(self.tally.accepted)

    def _by_source(self, counts: Iterable[int]) -> dict[str, int]:
        return {source: int(count) for source, count in zip(self.sources, counts, strict=True) if count}

    def waited(self, seconds: float, has_come: bool) -> None:
        """The target waited for the draft, and something came or not."""
        self.waits += 1
        self.waits_missed += not has_come
        self.wait_seconds += seconds

    def proposed(self, seconds: float) -> None:
        """One round took ``seconds``."""
        self.rounds += 1
        self.propose_seconds += seconds
        self.propose_max_seconds = max(self.propose_max_seconds, seconds)
        self.propose_buckets[bisect_left(PROPOSE_BUCKETS_S, seconds)] += 1
