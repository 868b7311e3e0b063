"""The speculation trie of one request on the target's side: everything that is ready to be verified.

Rooted at the last committed token. Edges carry a token, its chance and its source; drafted and retrieved tokens live in the
same trie. Nodes are named by the hash of the text before them, so that a record can be taken in whatever order it comes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vllm_double.hashing import mix

__all__ = ["Edge", "PathToken", "SpeculationTrie"]

_MIN_EDGE_PROB = 0.02  # an edge below this cannot be part of a chain worth verifying


class Edge(NamedTuple):
    """A possible next token: ``raw`` is what the source said, ``prob`` the calibrated chance that the target agrees."""

    token: int
    prob: float
    source: str
    raw: float


class PathToken(NamedTuple):
    """A token of a chosen path; ``reach`` is the chance that the target accepts everything up to and including it."""

    token: int
    prob: float
    source: str
    reach: float


class SpeculationTrie:
    """Edges by the hash of the prefix before them. ``position`` is the length of the committed text."""

    def __init__(self, root_hash: int, position: int) -> None:
        self.root_hash = root_hash
        self.position = position
        self._edges: dict[int, dict[int, Edge]] = {}
        self._hashes_at: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._edges)

    def edges(self, prefix_hash: int) -> dict[int, Edge]:
        """The edges behind a prefix by token; empty where nothing is known. Not to be changed."""
        return self._edges.get(prefix_hash, {})

    @property
    def has_hit(self) -> bool:
        """Whether something is ready behind the root."""
        return self.root_hash in self._edges

    def insert(self, prefix_hash: int, position: int, edges: Sequence[Edge]) -> None:
        """Edges behind a prefix of ``position`` tokens. What lies before the root is late and is dropped."""
        if position < self.position or not edges:
            return
        known = self._edges.get(prefix_hash)
        if known is None:
            known = self._edges[prefix_hash] = {}
            self._hashes_at.setdefault(position, []).append(prefix_hash)
        for edge in edges:
            old = known.get(edge.token)
            if old is None or edge.prob > old.prob or edge.source == old.source:
                known[edge.token] = edge

    def graft(self, prefix_hash: int, position: int, path: Sequence[Edge]) -> None:
        """A path of consecutive tokens behind a prefix of ``position`` tokens."""
        for edge in path:
            self.insert(prefix_hash, position, (edge,))
            prefix_hash = mix(prefix_hash, edge.token)
            position += 1

    def commit(self, token: int) -> None:
        """Move the root by one committed token; nodes at the old root's position fall away."""
        for prefix_hash in self._hashes_at.pop(self.position, ()):
            del self._edges[prefix_hash]
        self.root_hash = mix(self.root_hash, token)
        self.position += 1

    def best_path(self, max_tokens: int) -> list[PathToken]:
        """The path from the root with the highest expected number of accepted tokens, of at most ``max_tokens``."""
        best: dict[int, tuple[float, Edge | None]] = {}

        def value(prefix_hash: int, room: int) -> float:
            known = best.get(prefix_hash)
            if known is not None:
                return known[0]
            top, choice = 0.0, None
            if room > 0:
                for edge in self._edges.get(prefix_hash, {}).values():
                    # No subtree is worth more than ``room`` tokens: most edges need not be looked at.
                    if edge.prob >= _MIN_EDGE_PROB and edge.prob * room > top:
                        worth = edge.prob * (1.0 + value(mix(prefix_hash, edge.token), room - 1))
                        if worth > top:
                            top, choice = worth, edge
            best[prefix_hash] = (top, choice)
            return top

        value(self.root_hash, max_tokens)
        path: list[PathToken] = []
        prefix_hash, reach = self.root_hash, 1.0
        while (entry := best.get(prefix_hash)) is not None and entry[1] is not None:
            edge = entry[1]
            reach *= edge.prob
            path.append(PathToken(edge.token, edge.prob, edge.source, reach))
            prefix_hash = mix(prefix_hash, edge.token)
        return path

    def check_integrity(self) -> None:
        """Assert that every node is filed once, at a position that is not committed yet."""
        filed = [h for hashes in self._hashes_at.values() for h in hashes]
        assert len(filed) == len(set(filed)) and set(filed) == set(self._edges), "files differ from edges"
        assert all(position >= self.position for position in self._hashes_at), "a node lies before the root"
        assert all(token == edge.token for edges in self._edges.values() for token, edge in edges.items())
