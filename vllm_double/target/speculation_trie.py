"""The speculation trie of one request on the target's side: everything that is ready to be verified.

Rooted at the last committed token. Edges carry a token, its chance and its source; drafted and retrieved tokens live in the
same trie. Nodes are named by the hash of the text before them, so that a record can be taken in whatever order it comes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vllm_double.prefix_hash import mix
from vllm_double.target.calibration import NUM_BUCKETS

__all__ = ["DRAFT", "Edge", "PathToken", "SpeculationTrie"]

DRAFT = "draft"
_RIVALS = 3  # edges of a node that can be the way of the best path
_RIVAL_SHARE = 0.3  # of the best edge's chance, below which an edge is no rival


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
    """Edges by the hash of the prefix before them. ``position`` is the length of the committed text.

    ``curve``: the draft's live table of Calibration.curve, float [NUM_BUCKETS + 1].
    What the worker drafts is kept as it came: most of it is never looked at, because the target goes another way.
    """

    def __init__(self, root_hash: int, position: int, curve: Sequence[float]) -> None:
        self.root_hash = root_hash
        self.position = position
        self._curve = curve
        self._drafted: dict[int, tuple[list[int], list[float]]] = {}
        self._grafted: dict[int, dict[tuple[int, str], Edge]] = {}
        self._hashes_at: dict[int, set[int]] = {}

    def __len__(self) -> int:
        return len(self._drafted.keys() | self._grafted.keys())

    @property
    def has_hit(self) -> bool:
        """Whether something is ready behind the root."""
        return self.root_hash in self._drafted or self.root_hash in self._grafted

    def insert(self, prefix_hash: int, position: int, tokens: list[int], probs: list[float]) -> None:
        """What the draft says behind a prefix of ``position`` tokens, best first. Before the root it is late, and dropped."""
        if position >= self.position:
            self._drafted[prefix_hash] = (tokens, probs)
            self._file(prefix_hash, position)

    def graft(self, prefix_hash: int, position: int, path: Sequence[Edge]) -> None:
        """A retrieved path of consecutive tokens behind a prefix of ``position`` tokens."""
        for edge in path:
            if position >= self.position:
                self._grafted.setdefault(prefix_hash, {})[edge.token, edge.source] = edge
                self._file(prefix_hash, position)
            prefix_hash = mix(prefix_hash, edge.token)
            position += 1

    def ungraft(self) -> None:
        """Drop everything that was retrieved; what the draft said stays."""
        self._grafted.clear()
        for hashes in self._hashes_at.values():
            hashes.intersection_update(self._drafted)

    def _file(self, prefix_hash: int, position: int) -> None:
        hashes = self._hashes_at.get(position)
        if hashes is None:
            self._hashes_at[position] = {prefix_hash}
        else:
            hashes.add(prefix_hash)

    def _ways(self, prefix_hash: int) -> list[tuple[float, int, str]]:
        """The (chance, token, source) behind a prefix that a best path may take, most probable first."""
        ways: list[tuple[float, int, str]] = []
        drafted = self._drafted.get(prefix_hash)
        if drafted is not None:
            curve = self._curve
            tokens, probs = drafted
            prob = curve[int(probs[0] * NUM_BUCKETS)]
            ways.append((prob, tokens[0], DRAFT))
            floor = prob * _RIVAL_SHARE
            for place in range(1, min(len(tokens), _RIVALS)):
                prob = curve[int(probs[place] * NUM_BUCKETS)]
                if prob < floor:
                    break
                ways.append((prob, tokens[place], DRAFT))
        grafted = self._grafted.get(prefix_hash)
        if grafted is None:
            return ways
        for edge in grafted.values():
            # Where two sources agree on a token, the better chance counts.
            rival = next((way for way in ways if way[1] == edge.token), None)
            if rival is None or edge.prob > rival[0]:
                if rival is not None:
                    ways.remove(rival)
                ways.append((edge.prob, edge.token, edge.source))
        ways.sort(reverse=True)
        floor = ways[0][0] * _RIVAL_SHARE
        return [way for way in ways[:_RIVALS] if way[0] >= floor]

    def examples(self) -> list[tuple[str, float, int]]:
        """Everything that was said about the token behind the root, as (source, raw, token)."""
        drafted = self._drafted.get(self.root_hash)
        said = [(DRAFT, raw, token) for token, raw in zip(*drafted, strict=True)] if drafted is not None else []
        grafted = self._grafted.get(self.root_hash)
        if grafted is not None:
            said.extend((edge.source, edge.raw, edge.token) for edge in grafted.values())
        return said

    def first_drafted(self) -> int | None:
        """The draft's first token behind the root, if it has said what follows."""
        drafted = self._drafted.get(self.root_hash)
        return drafted[0][0] if drafted is not None else None

    def commit(self, token: int) -> None:
        """Move the root by one committed token; nodes at the old root's position fall away."""
        for prefix_hash in self._hashes_at.pop(self.position, ()):
            self._drafted.pop(prefix_hash, None)
            self._grafted.pop(prefix_hash, None)
        self.root_hash = mix(self.root_hash, token)
        self.position += 1

    def best_path(self, max_tokens: int) -> list[PathToken]:
        """The path from the root with the highest expected number of accepted tokens, of at most ``max_tokens``."""
        best: dict[int, tuple[tuple[float, int, str], int]] = {}  # the best way behind a prefix, and where it leads

        def value(prefix_hash: int, room: int) -> float:
            top = 0.0
            for way in self._ways(prefix_hash):
                prob = way[0]
                if prob * room <= top:
                    break
                child = mix(prefix_hash, way[1])
                known = room > 1 and (child in self._drafted or child in self._grafted)
                worth = prob * (1.0 + value(child, room - 1)) if known else prob
                if worth > top:
                    top = worth
                    best[prefix_hash] = way, child
            return top

        if max_tokens > 0:
            value(self.root_hash, max_tokens)
        path: list[PathToken] = []
        prefix_hash, reach = self.root_hash, 1.0
        while (entry := best.get(prefix_hash)) is not None and len(path) < max_tokens:
            (prob, token, source), prefix_hash = entry
            reach *= prob
            path.append(PathToken(token, prob, source, reach))
        return path

    def check_integrity(self) -> None:
        """Assert that every node is filed once, at a position that is not committed yet."""
        filed = [h for hashes in self._hashes_at.values() for h in hashes]
        assert len(filed) == len(set(filed)), "a node is filed twice"
        assert set(filed) == self._drafted.keys() | self._grafted.keys(), "files differ from edges"
        assert all(position >= self.position for position in self._hashes_at), "a node lies before the root"
        keys = [(key, edge) for edges in self._grafted.values() for key, edge in edges.items()]
        assert all(key == (edge.token, edge.source) for key, edge in keys), "an edge has another's key"
