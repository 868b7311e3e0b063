"""What the target's side counts; the metrics page shows it. Plain numbers, added to on the hot path."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_double.target.speculation_trie import PathToken

__all__ = ["PROPOSE_BUCKETS_S", "Counters"]

PROPOSE_BUCKETS_S = (50e-6, 100e-6, 200e-6, 300e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)


@dataclass(slots=True)
class Counters:
    """Monotone counts since the start, but for ``worker``, which is the worker's own last report.

    draft_first_examples: committed tokens for which it is known what the draft had listed; of these draft_first_accepted were
    the first of the list, draft_listed_accepted among the three that the target reads of it.

    rows: request rows that a target forward sampled for, those without draft tokens included. A *harvest* is a row that
    asked for drafts; it is a *hit* when something was ready behind its new last token.
    """

    rounds: int = 0
    rows: int = 0
    rows_without_drafts: int = 0
    committed_tokens: int = 0
    harvests: int = 0
    hits: int = 0
    late_nodes: int = 0
    rewinds: int = 0
    resynchronisations: int = 0
    rounds_without_worker: int = 0
    failures: int = 0
    losses: int = 0
    draft_rests: int = 0
    draft_first_examples: int = 0
    draft_first_accepted: int = 0
    draft_listed_accepted: int = 0
    waits: int = 0
    waits_missed: int = 0
    wait_seconds: float = 0.0
    offered: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    proposed_tokens: int = 0
    expected_tokens: float = 0.0  # of the proposed ones, those that should be accepted if the calibration is right
    propose_seconds: float = 0.0
    propose_max_seconds: float = 0.0
    propose_buckets: list[int] = field(default_factory=lambda: [0] * (len(PROPOSE_BUCKETS_S) + 1))
    worker: dict[str, float] = field(default_factory=dict)

    def committed(self, num_new: int, num_accepted: int, verified: Sequence[int], chain: Sequence[PathToken]) -> None:
        """One sampled row: ``num_accepted`` of ``verified`` were accepted; ``chain`` is what was proposed."""
        self.rows += 1
        self.committed_tokens += num_new
        if not verified:
            self.rows_without_drafts += 1
            return
        # The scheduler may cut a chain, or schedule tokens that nobody proposed.
        for place, (step, token) in enumerate(zip(chain, verified, strict=False)):
            if step.token != token:
                break
            self.offered[step.source] = self.offered.get(step.source, 0) + 1
            if place < num_accepted:
                self.accepted[step.source] = self.accepted.get(step.source, 0) + 1

    def harvested(self, hit: bool) -> None:
        """A row asked for drafts."""
        self.harvests += 1
        self.hits += hit

    def waited(self, seconds: float, has_come: bool) -> None:
        """The target waited for the draft, and something came or not."""
        self.waits += 1
        self.waits_missed += not has_come
        self.wait_seconds += seconds

    def proposed(self, seconds: float, chains: Iterable[Sequence[PathToken]]) -> None:
        """One round took ``seconds`` and gave ``chains``."""
        self.rounds += 1
        for chain in chains:
            self.proposed_tokens += len(chain)
            self.expected_tokens += sum([step.reach for step in chain])
        self.propose_seconds += seconds
        self.propose_max_seconds = max(self.propose_max_seconds, seconds)
        self.propose_buckets[bisect_left(PROPOSE_BUCKETS_S, seconds)] += 1
