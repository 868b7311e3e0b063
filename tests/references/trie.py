"""A speculation trie as dictionaries, one for each request, and the calibration as lists: what the arena is compared with."""

from collections.abc import Sequence
from typing import NamedTuple

from vllm_double.prefix_hash import mix

__all__ = ["Edge", "PathToken", "TwinCalibration", "TwinTrie"]

NUM_BUCKETS, RIVALS, RIVAL_SHARE, PRIOR_TRIALS, DECAY_AT = 20, 3, 0.3, 20.0, 4000.0
DRAFT = 0


class Edge(NamedTuple):
    """A possible next token: ``belief`` is what the source said, ``prob`` the calibrated probability."""

    token: int
    prob: float
    source: int
    belief: float


class PathToken(NamedTuple):
    token: int
    prob: float
    source: int
    accept_prob: float


class TwinCalibration:
    """Acceptance by source, temperature bucket and bucket of the source's own probability."""

    def __init__(self) -> None:
        self.hits: dict[tuple[int, int, int], float] = {}
        self.trials: dict[tuple[int, int, int], float] = {}

    def prob(self, source: int, temperature: int, belief: float) -> float:
        key = source, temperature, min(int(belief * NUM_BUCKETS), NUM_BUCKETS - 1)
        middle = (key[2] + 0.5) / NUM_BUCKETS
        if key not in self.trials:
            return middle
        return min(max(self.hits[key] / self.trials[key], 1e-4), 0.995)

    def observe(self, source: int, temperature: int, belief: float, is_right: bool) -> None:
        key = source, temperature, min(int(belief * NUM_BUCKETS), NUM_BUCKETS - 1)
        middle = (key[2] + 0.5) / NUM_BUCKETS
        tried = self.trials.get(key, PRIOR_TRIALS) + 1
        hit = self.hits.get(key, PRIOR_TRIALS * middle) + is_right
        halves = 2 if tried > DECAY_AT else 1
        self.trials[key], self.hits[key] = tried / halves, hit / halves


class TwinTrie:
    """Edges by the hash of the prefix before them. ``position`` is the length of the committed text."""

    def __init__(self, root_hash: int, position: int, calibration: TwinCalibration, temperature: int) -> None:
        self.root_hash = root_hash
        self.position = position
        self.drafted: dict[int, tuple[list[int], list[float]]] = {}
        self.inserted: dict[int, dict[tuple[int, int], Edge]] = {}
        self.positions: dict[int, int] = {}
        self._calibration, self._temperature = calibration, temperature

    @property
    def num_nodes(self) -> int:
        return len(self.drafted.keys() | self.inserted.keys())

    @property
    def has_hit(self) -> bool:
        return self.root_hash in self.drafted or self.root_hash in self.inserted

    def file(self, prefix_hash: int, position: int, tokens: list[int], probs: list[float]) -> None:
        if position >= self.position:
            self.drafted[prefix_hash] = tokens, probs
            self.positions[prefix_hash] = position

    def insert(self, prefix_hash: int, position: int, path: Sequence[Edge]) -> None:
        for edge in path:
            self.inserted.setdefault(prefix_hash, {})[edge.token, edge.source] = edge
            self.positions[prefix_hash] = position
            prefix_hash = mix(prefix_hash, edge.token)
            position += 1

    def forget_inserted(self) -> None:
        self.inserted.clear()

    def ways(self, prefix_hash: int) -> list[tuple[float, int, int]]:
        """The (probability, token, source) behind a prefix that a best path may take, most probable first."""
        ways: list[tuple[float, int, int]] = []
        tokens, beliefs = self.drafted.get(prefix_hash, ([], []))
        for token, belief in zip(tokens, beliefs, strict=True):
            prob = self._calibration.prob(DRAFT, self._temperature, belief)
            if ways and prob < ways[0][0] * RIVAL_SHARE:
                break
            ways.append((prob, token, DRAFT))
        if prefix_hash in self.inserted:
            for edge in self.inserted[prefix_hash].values():  # if two sources agree on a token, the better chance counts
                rival = next((way for way in ways if way[1] == edge.token), None)
                if rival is None or edge.prob > rival[0]:
                    ways = [way for way in ways if way is not rival]
                    ways.append((edge.prob, edge.token, edge.source))
            ways.sort(reverse=True)
        return [way for way in ways[:RIVALS] if way[0] >= ways[0][0] * RIVAL_SHARE]

    def commit(self, token: int) -> None:
        """Everything that was said about the token is an example; then the root moves."""
        for said, belief in zip(*self.drafted.get(self.root_hash, ([], [])), strict=True):
            self._calibration.observe(DRAFT, self._temperature, belief, said == token)
        for edge in self.inserted.get(self.root_hash, {}).values():
            self._calibration.observe(edge.source, self._temperature, edge.belief, edge.token == token)
        for prefix_hash, position in list(self.positions.items()):
            if position <= self.position:
                del self.positions[prefix_hash]
                self.drafted.pop(prefix_hash, None)
                self.inserted.pop(prefix_hash, None)
        self.root_hash = mix(self.root_hash, token)
        self.position += 1

    def best_path(self, max_tokens: int) -> list[PathToken]:
        """The path with the highest expected number of accepted tokens: every path is tried."""

        def best(prefix_hash: int, room: int) -> tuple[float, list[tuple[float, int, int]]]:
            top: tuple[float, list[tuple[float, int, int]]] = (0.0, [])
            for way in self.ways(prefix_hash) if room else ():
                worth, behind = best(mix(prefix_hash, way[1]), room - 1)
                if way[0] * (1.0 + worth) > top[0]:
                    top = way[0] * (1.0 + worth), [way, *behind]
            return top

        path: list[PathToken] = []
        accept_prob = 1.0
        for prob, token, source in best(self.root_hash, max_tokens)[1]:
            accept_prob *= prob
            path.append(PathToken(token, prob, source, accept_prob))
        return path
