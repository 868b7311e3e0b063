"""The speculation tries of all requests: everything that is ready to be verified, in one arena.

A request's trie is rooted at its last committed token. Edges carry a token, its probability and its source; drafted and
retrieved tokens lie in the same trie. Nodes are named by the hash of the text before them, so that a record can be taken in
whatever order it comes. `_trie_steps` holds the functions.
"""

import sys
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from vllm_double.target._trie_steps import MAX_WAYS, NONE, NUM_REFUSED
from vllm_double.transport.messages import MAX_CHILDREN

__all__ = ["CHAIN_TOKEN", "Records", "Search", "Tries", "check_integrity", "num_depths"]

Records: TypeAlias = npt.NDArray[np.void]

REQUEST = np.dtype(
    [
        ("key", "u8"),  # number of this admission; 0: the slot is free
        ("root_hash", "u8"),
        ("length", "i8"),  # of the text; the root's position
        ("max_length", "i8"),
        ("seed", "i8"),  # of the noise that its tokens are drawn with
        ("temperature", "i4"),  # see calibration.temperature_bucket
        ("stops_start", "i4"),  # its stop tokens in ``stops``, rising
        ("stops_end", "i4"),
        ("chain_length", "i4"),
        ("handle", "u8"),  # of its latest admission to a worker; 0: there was none
        ("session", "u8"),  # the worker's session that knows the handle; 0: none does
        ("num_sent", "i8"),  # tokens of the text that were sent to the worker
        ("num_committed", "i8"),  # tokens since the draft's trial began, see _round_steps.observe_use
        ("num_accepted", "i8"),
        ("pause", "i8"),  # tokens for which the draft still pauses
        ("next_pause", "i8"),
        ("use_drafts", "?"),
        ("use_worker", "?"),
        ("finished", "?"),
        ("has_drafted", "?"),  # the worker has drafted since its admission, or since its last pause
        ("missed", "?"),  # nothing was ready behind the last committed token when the round began
        ("waited", "?"),  # and the target waited for its chain
        ("has_refusals", "?"),
    ],
    align=True,
)
NODE = np.dtype(
    [
        ("prefix_hash", "u8"),
        ("owner", "i4"),  # slot of its request
        ("num_listed", "i4"),
        ("first_edge", "i4"),
        ("next_at_position", "i4"),
        ("next_in_bucket", "i4"),
        ("tokens", "i4", (MAX_CHILDREN,)),
        ("probs", "f4", (MAX_CHILDREN,)),
    ],
    align=True,
)
EDGE = np.dtype([("token", "i4"), ("source", "i4"), ("next", "i4"), ("belief", "f4"), ("prob", "f8")], align=True)
CHAIN_TOKEN = np.dtype([("token", "i4"), ("source", "i4"), ("prob", "f8"), ("accept_prob", "f8")], align=True)
"""accept_prob: the probability that the target accepts everything up to and including the token."""
WAY = np.dtype([("token", "i4"), ("source", "i4"), ("prob", "f8"), ("child", "i4")], align=True)
FRAME = np.dtype(
    [
        ("node", "i4"), ("num_ways", "i4"), ("next", "i4"), ("best", "f8"), ("accept_prob", "f8"),
        ("tokens", "i4", (3,)), ("sources", "i4", (3,)), ("probs", "f8", (3,)),
    ],
    align=True,
)  # fmt: skip
POOL = np.dtype([("num_free_nodes", "i8"), ("num_free_edges", "i8"), ("nodes_evicted", "i8")])
LIMITS = np.dtype(
    [
        ("trial_tokens", "i8"), ("least_share", "f8"), ("first_pause", "i8"), ("longest_pause", "i8"), ("place_tokens", "i8"),
        ("vocab_size", "i8"),
    ]
)  # fmt: skip

_TRIAL_TOKENS = 64  # by which the draft is judged
_LEAST_SHARE = 0.02  # of the committed tokens that the draft has to bring
_FIRST_PAUSE, _LONGEST_PAUSE = 256, 1024  # tokens; each pause is twice as long as the one before, while trials fail
_PLACE_TOKENS = 8  # a place in a text is recognised by so many tokens before it


class Tries(NamedTuple):
    """The arena. Sizes of ``heads``, ``refusals`` and the second one of ``at_position`` are powers of two."""

    requests: Records
    """REQUEST [slots]"""
    chains: Records
    """CHAIN_TOKEN [slots, most tokens of a chain]: what the target verifies, ``chain_length`` of them."""
    at_position: npt.NDArray[np.int32]
    """[slots, depths]: first node of each position of a request, by the position's remainder."""
    nodes: Records
    """NODE [n]"""
    best: Records
    """WAY [n]: the best way behind a node, while a path is searched."""
    edges: Records
    """EDGE [m]"""
    heads: npt.NDArray[np.int32]
    """First node of each bucket of the hash table."""
    free_nodes: npt.NDArray[np.int32]
    """[n], a stack"""
    free_edges: npt.NDArray[np.int32]
    """[m], a stack"""
    pool: Records
    """POOL [1]"""
    refusals: npt.NDArray[np.uint64]
    """[buckets, NUM_REFUSED]: names of tokens that the target did not want at some place, the newest first."""
    stops: npt.NDArray[np.int32]
    """Stop tokens of all requests."""
    limits: Records
    """LIMITS [1]"""

    @classmethod
    def empty(cls, num_slots: int, max_chain: int, num_nodes: int, num_edges: int, vocab_size: int = sys.maxsize) -> "Tries":
        """num_nodes: a power of two. vocab_size: tokens beyond it are not offered."""
        pool = np.zeros(1, POOL)
        limits = (_TRIAL_TOKENS, _LEAST_SHARE, _FIRST_PAUSE, _LONGEST_PAUSE, _PLACE_TOKENS, vocab_size)
        pool["num_free_nodes"], pool["num_free_edges"] = num_nodes, num_edges
        return cls(
            requests=np.zeros(num_slots, REQUEST),
            chains=np.zeros((num_slots, max_chain), CHAIN_TOKEN),
            at_position=np.full((num_slots, num_depths(max_chain)), NONE, np.int32),
            nodes=np.zeros(num_nodes, NODE),
            best=np.zeros(num_nodes, WAY),
            edges=np.zeros(num_edges, EDGE),
            heads=np.full(2 * num_nodes, NONE, np.int32),
            free_nodes=np.arange(num_nodes - 1, -1, -1, dtype=np.int32),
            free_edges=np.arange(num_edges - 1, -1, -1, dtype=np.int32),
            pool=pool,
            refusals=np.zeros((1 << 12, NUM_REFUSED), np.uint64),
            stops=np.zeros(1 << 10, np.int32),
            limits=np.array([limits], LIMITS),
        )

    def grown(self) -> "Tries":
        """With twice as many slots, and the same contents."""
        double = Tries.empty(2 * len(self.requests), self.chains.shape[1], 1, 1)
        for name in ("requests", "chains", "at_position"):
            getattr(double, name)[: len(self.requests)] = getattr(self, name)
        return self._replace(requests=double.requests, chains=double.chains, at_position=double.at_position)


class Search(NamedTuple):
    """What the search for paths writes beside the tries."""

    stack: Records
    """FRAME [most tokens of a chain]"""
    ways: Records
    """WAY [MAX_WAYS + 1]"""
    path: Records
    """CHAIN_TOKEN [most tokens of a chain]: retrieved tokens."""
    recent: npt.NDArray[np.int32]
    """The end of a text, a path behind it, and retrieved tokens behind that."""

    @classmethod
    def empty(cls, max_chain: int) -> "Search":
        return cls(
            np.zeros(max_chain + 1, FRAME), np.zeros(MAX_WAYS + 1, WAY), np.zeros(max_chain, CHAIN_TOKEN),
            np.zeros(_PLACE_TOKENS + 2 * max_chain + 1, np.int32),
        )  # fmt: skip


def num_depths(max_chain: int) -> int:
    """How far behind a root a node can be of use: the worker works no further than a chain behind each outcome of a chain."""
    return 1 << (2 * max_chain + 1).bit_length()


def check_integrity(tries: Tries) -> None:
    """Assert that each node is filed once, at a position that is not committed yet, and that none was lost. Slow: for tests."""
    nodes, num_depth = tries.nodes, tries.at_position.shape[1]
    seen: set[int] = set()
    num_edges = 0
    for slot, request in enumerate(tries.requests):
        for place in range(num_depth):
            node = int(tries.at_position[slot, place])
            while node != NONE:
                assert node not in seen, "a node is filed twice"
                assert request["key"] and nodes["owner"][node] == slot, "a node of a request that is gone"
                seen.add(node)
                edge = int(nodes["first_edge"][node])
                said: set[tuple[int, int]] = set()
                while edge != NONE:
                    num_edges += 1
                    key = int(tries.edges["token"][edge]), int(tries.edges["source"][edge])
                    assert key not in said, "a source said a token twice"
                    said.add(key)
                    edge = int(tries.edges["next"][edge])
                assert said or nodes["num_listed"][node] > 0, "an empty node"
                node = int(nodes["next_at_position"][node])
    filed: set[int] = set()
    for node in tries.heads.tolist():
        while node != NONE:
            assert node not in filed, "a node stands twice in the table"
            filed.add(node)
            node = int(nodes["next_in_bucket"][node])
    assert filed == seen, "the table and the lists differ"
    free = tries.free_nodes[: tries.pool["num_free_nodes"][0]].tolist()
    assert len(set(free)) == len(free) and seen.isdisjoint(free) and len(seen) + len(free) == len(nodes)
    assert num_edges + tries.pool["num_free_edges"][0] == len(tries.edges)
