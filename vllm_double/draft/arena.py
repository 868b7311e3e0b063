"""The draft's state: nodes, branches and pages of all requests, in arrays of records with named fields.

Every node is a token that may follow a request's text; its path probability is the chance that the target's text will pass
through it. A node is *computed* when its key and value lie on a branch and the draft has said what follows it. A branch is a
block table: branches share full pages, and exactly one of them owns the writable slots of a partly filled page.

Nodes and branches have free lists, and an owner each. Functions compiled by numba take the arrays by name: nothing here has a
method.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval.base import Queries

__all__ = [
    "MAX_AHEAD", "NONE", "PAGE", "TOTALS", "Arena", "Floats", "Forward", "Ints", "Records", "integer", "make_arena",
    "make_forward", "with_slots",
]  # fmt: skip

Records: TypeAlias = npt.NDArray[np.void]
Ints: TypeAlias = npt.NDArray[np.int32]
Indices: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float32]
integer = cast("Callable[[Any], int]", np.int64)
"""Of a compiled function's argument: literals and 32-bit integers would be compiled apart."""
NONE = integer(-1)
MAX_AHEAD = 32
"""Tokens that are retrieved behind one node at most."""
_MIN_TEXT = 4096
_MIN_STOPS = 8

NODE = np.dtype(
    [
        ("hash", "u8"),  # names the text up to the node
        ("log_prob", "f8"),  # of the whole path since admission: only differences below one root mean anything
        ("key", "f8"),  # as a candidate: its own log_prob, or that of the best of its list that is no node yet
        ("slot", "i8"),  # of the request; NONE: the node is free
        ("token", "i4"), ("position", "i8"), ("parent", "i8"), ("first_child", "i8"),
        ("next_sibling", "i8"),  # of a free node: the next free one
        ("first_below", "i8"), ("next_beside", "i8"), ("before", "i8"),  # in the heap of candidates, see `candidates`
        ("branch", "i8"),  # on which it is computed, or will be by the forward
        ("num_listed", "i8"), ("next_listed", "i8"),  # next_listed: the first of its list that was no candidate yet
        ("ahead_from", "i8"), ("ahead_to", "i8"),  # the part of its row of `Arena.ahead` that was retrieved behind it
        ("run", "i8"),  # of the forward, if the run ends with the node
        ("is_candidate", "?"), ("is_retrieved", "?"),
        ("is_picked", "?"),  # for the next forward, of which it is a tip or not
        ("is_tip", "?"),
        ("is_fresh", "?"),  # its key and value come with the forward under way
    ],
    align=True,
)  # fmt: skip
# What the draft said behind a computed node. prob: that the token is drawn; log_q and noise: of sampled requests.
LISTED = np.dtype([("token", "i4"), ("prob", "f4"), ("log_q", "f4"), ("noise", "f4")])
AHEAD = np.dtype([("token", "i4"), ("log_prob", "f8")], align=True)
REQUEST = np.dtype(
    [
        ("handle", "u8"),
        ("hash", "u8"),  # of the text, counted from its length at admission
        ("num_admitted", "i8"), ("max_length", "i8"), ("length", "i8"),
        ("chain_length", "i8"),  # draft tokens that the target verifies now
        ("num_cached", "i8"),  # committed positions whose keys and values lie on the trunk
        ("num_inserted", "i8"),  # pages of the trunk that are in the prefix cache: they are not written any more
        ("num_expanded", "i8"),  # nodes since the latest commit
        ("root", "i8"),  # the last committed token; NONE until the whole text at admission is here
        ("best", "i8"),  # candidate
        ("trunk", "i8"),  # the branch of the text
        ("num_stops", "i8"),
        ("score", "f8"),  # log-probability of its best candidate, from the root
        ("is_live", "?"), ("is_sampled", "?"), ("has_ended", "?"),
        ("is_awaited", "?"),  # the target waits for what follows the text
    ],
    align=True,
)  # fmt: skip
# first: positions of the block table before it are the trunk's. length: in tokens. num_held: nodes that lie on the branch.
BRANCH = np.dtype([("slot", "i8"), ("first", "i8"), ("length", "i8"), ("num_held", "i8"), ("num_pages", "i8"), ("next", "i8")])
# Pages of the prefix cache that nobody holds are a list, the one that was released first at its head; free pages are another.
PAGE = np.dtype([("holders", "i8"), ("before", "i8"), ("next", "i8"), ("is_cached", "?")], align=True)
TOTALS = np.dtype(
    [
        ("free_node", "i8"), ("num_free_nodes", "i8"), ("free_branch", "i8"),
        ("free_page", "i8"), ("num_free_pages", "i8"), ("oldest_page", "i8"), ("newest_page", "i8"), ("num_evictable", "i8"),
        ("retrieved_tokens", "i8"),  # that the draft has read
        ("confirmed_tokens", "i8"),  # those of them that it would have said itself
        ("nodes_evicted", "i8"),  # because nodes or pages ran out
        ("is_short", "?"),  # of pages: a text, or a request that had to be served, got none
    ],
    align=True,
)  # fmt: skip


LIMITS = np.dtype([(name, "i8") for name in ("page_size", "max_length", "vocab_size", "num_speculative_tokens")])


class Arena(NamedTuple):
    """All requests' state. ``totals``, ``limits``: one record each.

    By node: nodes [n], listed [n, children], ahead [n, MAX_AHEAD]. By slot: requests [s], texts int32 [s, width], trunks int32
    [s, pages of the longest text], stops int32 [s, width]. By branch: branches [b], branch_pages int32 [b, its own pages].
    """

    nodes: Records
    listed: Records
    ahead: Records
    requests: Records
    texts: Ints
    trunks: Ints
    stops: Ints
    branches: Records
    branch_pages: Ints
    pages: Records
    totals: Records
    limits: Records


# One row of the forward: num_text tokens of the text and then num_nodes nodes, the last of which is ``tip``.
RUN = np.dtype([("slot", "i8"), ("branch", "i8"), ("start", "i8"), ("num_text", "i8"), ("num_nodes", "i8"), ("tip", "i8")])
COPY = np.dtype([("source", "i8"), ("destination", "i8"), ("used", "i8")])
DRAW = np.dtype([("seed", "i8"), ("log_q_weight", "f4"), ("noise_weight", "f4"), ("coverage", "f4")], align=True)
"""Of a sampled request, by slot: its seed, and the weights of `NoiseCoupling`."""
LESSON = np.dtype([("node", "i8"), ("num_listed", "i8"), ("drawn", "i8")])
PROGRESS = np.dtype(
    [
        ("budget", "i8"), ("num_picks", "i8"), ("num_placed", "i8"), ("num_read", "i8"), ("num_waiting", "i8"),
        ("prefill_budget", "i8"), ("deferred", "i8"),  # deferred: the first of the picked nodes that come too early
        ("num_runs", "i8"), ("num_copies", "i8"), ("num_outputs", "i8"), ("num_tokens", "i8"), ("num_queries", "i8"),
        ("num_lessons", "i8"),
        ("min_log_prob", "f8"),  # of a path that is worked on
        ("bound", "f8"), ("lacking", "i8"),  # of the path that lacks so many pages
        ("is_full", "?"),  # nothing less probable may be evicted for pages
    ],
    align=True,
)  # fmt: skip


class Forward(NamedTuple):
    """What is chosen for one forward, and the batch for the engine. ``progress``: one record.

    picks: nodes in the order of their choice. runs: rows of the batch. outputs: nodes. copies: of tail pages. token_ids, layout
    int32 [3, rows + 1] (starts, num_outputs, query_start) and tables int32 [rows, pages]: see `base.Batch`. queries: what the
    sources are asked, behind the nodes ``asked``. lessons: lists for which the latest commit says what was drawn. filled: slots
    whose trunk has pages for the prefix cache.
    """

    progress: Records
    picks: Indices
    runs: Records
    outputs: Indices
    copies: Records
    token_ids: Indices
    layout: Ints
    tables: Ints
    asked: Indices
    queries: Queries
    lessons: Records
    filled: Indices


def make_arena(
    pages: Records, totals: Records, num_nodes: int, num_children: int, page_size: int, max_length: int, vocab_size: int,
    num_speculative_tokens: int,
) -> Arena:  # fmt: skip
    """For the pages of one pool, without slots."""
    nodes, branches = np.zeros(num_nodes, NODE), np.zeros(num_nodes + num_nodes // 2, BRANCH)
    nodes["slot"] = branches["slot"] = NONE
    nodes["next_sibling"] = [*range(1, num_nodes), NONE]
    branches["next"] = [*range(1, len(branches)), NONE]
    totals["num_free_nodes"] = num_nodes
    limits = np.zeros(1, LIMITS)
    limits["page_size"], limits["max_length"], limits["vocab_size"] = page_size, max_length, vocab_size
    limits["num_speculative_tokens"] = num_speculative_tokens
    # A branch leaves the text's, or another branch, within the reach of one commit, and ends within that of a later one.
    num_branch_pages = (4 * num_speculative_tokens + 2) // page_size + 3
    return Arena(
        nodes, np.zeros((num_nodes, num_children), LISTED), np.zeros((num_nodes, MAX_AHEAD), AHEAD),
        np.zeros(0, REQUEST), np.zeros((0, _MIN_TEXT), np.int32), np.zeros((0, -(-max_length // page_size) + 1), np.int32),
        np.zeros((0, _MIN_STOPS), np.int32), branches, np.zeros((len(branches), num_branch_pages), np.int32),
        pages, totals, limits,
    )  # fmt: skip


def make_forward(arena: Arena, num_nodes: int, prefill_tokens: int) -> Forward:
    """For so many nodes at most beside one for each slot of the arena, and so many tokens of texts."""
    num_slots, depth = len(arena.requests), 2 * int(arena.limits["num_speculative_tokens"][0]) + 2
    rows = num_nodes + 2 * num_slots  # a request's text is read, and it has a node beside those that are the most probable
    return Forward(
        np.zeros(1, PROGRESS), np.zeros(rows, np.int64), np.zeros(rows, RUN), np.zeros(rows, np.int64), np.zeros(rows, COPY),
        np.zeros(rows + prefill_tokens, np.int64), np.zeros((3, rows + 1), np.int32),
        np.zeros((rows, arena.trunks.shape[1]), np.int32), np.zeros(rows, np.int64),
        Queries(*(np.zeros(shape, np.int32) for shape in (rows, (rows, depth), rows, rows))),
        np.zeros(2 * depth, LESSON), np.zeros(rows, np.int64),
    )  # fmt: skip


def with_slots(arena: Arena, num_slots: int = 0, text: int = 0, stops: int = 0) -> Arena:
    """With room for so many requests, tokens of a text and stop tokens at least, and with all that there was."""
    num_slots = max(num_slots, len(arena.requests))
    requests = _grown(arena.requests, (num_slots,))
    texts = _grown(arena.texts, (num_slots, max(text, arena.texts.shape[1])))
    return arena._replace(
        requests=requests, texts=texts, trunks=_grown(arena.trunks, (num_slots, arena.trunks.shape[1])),
        stops=_grown(arena.stops, (num_slots, max(stops, arena.stops.shape[1]))),
    )  # fmt: skip


def _grown(array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if array.shape == shape:
        return array
    found = np.zeros(shape, array.dtype)
    found[tuple(map(slice, array.shape))] = array
    return found
