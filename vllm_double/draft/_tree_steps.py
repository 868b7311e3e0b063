"""Steps of the draft's trees: compiled functions on the arrays that `tree` and `frontier` describe.

A node's parent always has a lower number than the node; the root's number is 0. Functions without an underscore before their
names take addresses, and are called from Python.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from vllm_double.draft._page_steps import (
    HEADER_LENGTH as POOL_LENGTH,
)
from vllm_double.draft._page_steps import (
    Header,
    Ints,
    header_at,
    num_available,
    num_holders,
    release_page,
    share_page,
    take_page,
)
from vllm_double.jit import of_numbers, part, pointer
from vllm_double.transport.messages import MAX_CHILDREN, NODE_DTYPE

Floats = npt.NDArray[np.float64]
NONE = -1

# A tree's header. Lengths are in tokens; the text at admission is whole once there is a root.
(
    HANDLE, LENGTH, CHAIN_LENGTH, NUM_CACHED, NUM_EXPANDED, MAX_LENGTH, HAS_ENDED, PAGE_SIZE, NUM_STOPS, NUM_NODES, CAPACITY,
    NUM_CHILDREN, NUM_CANDIDATES, ORDER, NUM_BRANCHES, BRANCH_PAGES, NUM_PUT_BACK,
    TEXT_AT, STOPS_AT, TRUNK_AT, NODES_AT, HASHES_AT, LOG_PROBS_AT, LISTED_AT, LISTED_LOG_PROBS_AT, AHEAD_AT,
    AHEAD_LOG_PROBS_AT, CANDIDATE_KEYS_AT, CANDIDATES_AT, BRANCHES_AT, PAGES_AT,
) = range(31)  # fmt: skip
TREE_LENGTH = PAGES_AT + 1
# Columns of a node. LISTED: what the draft listed behind it; NEXT_LISTED: the first of these that was no candidate yet.
# AHEAD_FROM..AHEAD_TO of its row of AHEAD was retrieved behind it. RUN: of the iteration, where it ends with the node.
(
    TOKEN, POSITION, PARENT, FIRST_CHILD, NEXT_SIBLING, BRANCH, NUM_LISTED, NEXT_LISTED, IS_RETRIEVED, IS_FRESH, AHEAD_FROM,
    AHEAD_TO, RUN, MOVED_TO,
) = range(14)  # fmt: skip
NODE_COLUMNS = MOVED_TO + 1
MAX_AHEAD = 32
"""Tokens that are retrieved behind one node at most."""
# Columns of a candidate: which of the node's list is meant (ITSELF: the node), and a tie-breaker. A node has three at most:
# itself, itself when the draft knew better how likely it is, and the best of its list that is no node yet.
NODE, PLACE, TIE = range(3)
ITSELF = -1
# Columns of a branch. Branch 0 is the trunk, whose pages are at TRUNK_AT; others' pages before FIRST are the trunk's. NUM_HELD:
# nodes that lie on it.
FIRST, BRANCH_LENGTH, NUM_HELD, NUM_BRANCH_PAGES, BRANCH_MOVED_TO = range(5)
BRANCH_COLUMNS = BRANCH_MOVED_TO + 1

# The header of an iteration. QUEUE: trees with a candidate, the best first. ASKED: what a source is to be asked for. MINIMUM:
# float64 [2], the log-probability of a path below which it is not worked on, and that below which no source is asked.
(
    NUM_TREES, BUDGET, NUM_SPECULATIVE, MAX_MODEL_LENGTH, HAS_SOURCES, ASKED_TREE, ASKED_NODE, ASKED_ROOM, NUM_QUEUED,
    NUM_RUNS, NUM_COPIES, NUM_OUTPUTS, NUM_TOKENS, NUM_RETRIEVED, NUM_CONFIRMED, MAX_RUNS,
    TREES_AT, QUEUE_KEYS_AT, QUEUE_AT, RUNS_AT, COPIES_AT, OUTPUTS_AT, MINIMUM_AT,
) = range(23)  # fmt: skip
ITERATION_LENGTH = MINIMUM_AT + 1
NOT_BEGUN = -1
"""NUM_QUEUED before the first `select` of an iteration."""
# Columns of a run: one row of the forward, so many tokens of the text and then so many nodes, the last of which is TIP.
TREE, RUN_BRANCH, START, NUM_TEXT, NUM_RUN_NODES, TIP = range(6)
# What `select` returns: all is chosen; pages ran out; a source is to be asked; the tree ASKED_TREE has no room.
DONE, STARVED, ASKS, FULL = range(4)
RECORD_WORDS, MAX_TOLD = NODE_DTYPE.itemsize // 4, MAX_CHILDREN
_UNSERVED = 1e6  # requests that were not served since their last commit come before all others


@part
def _ints(address: int, rows: int, columns: int) -> Ints:
    return numba.carray(pointer(address), (rows, columns), np.int32)  # type: ignore[no-any-return]


@part
def _floats(address: int, length: int) -> Floats:
    return numba.carray(pointer(address), (length,), np.float64)  # type: ignore[no-any-return]


@part
def _nodes(tree: Header) -> Ints:
    return _ints(tree[NODES_AT], tree[CAPACITY], NODE_COLUMNS)


@part
def _log_probs(tree: Header) -> Floats:
    """Of the whole path since admission: only differences below one root mean anything."""
    return _floats(tree[LOG_PROBS_AT], tree[CAPACITY])


@part
def _hashes(tree: Header) -> npt.NDArray[np.uint64]:
    return numba.carray(pointer(tree[HASHES_AT]), (tree[CAPACITY],), np.uint64)  # type: ignore[no-any-return]


@part
def _listed(tree: Header) -> tuple[Ints, npt.NDArray[np.float32]]:
    shape = (tree[CAPACITY], tree[NUM_CHILDREN])
    return (
        numba.carray(pointer(tree[LISTED_AT]), shape, np.int32),
        numba.carray(pointer(tree[LISTED_LOG_PROBS_AT]), shape, np.float32),
    )


@part
def _ahead(tree: Header) -> tuple[Ints, npt.NDArray[np.float32]]:
    shape = (tree[CAPACITY], MAX_AHEAD)
    return (
        numba.carray(pointer(tree[AHEAD_AT]), shape, np.int32),
        numba.carray(pointer(tree[AHEAD_LOG_PROBS_AT]), shape, np.float32),
    )


@part
def _tree_at(iteration: Header, index: int) -> Header:
    return header_at(header_at(iteration[TREES_AT], iteration[NUM_TREES])[index], TREE_LENGTH)


# ---- candidates: a binary heap by falling probability ---------------------------------------------------------------


@part
def _before(keys: Floats, entries: Ints, one: int, other: int) -> bool:
    if keys[one] == keys[other]:
        return entries[one, TIE] < entries[other, TIE]  # type: ignore[no-any-return]
    return keys[one] > keys[other]  # type: ignore[no-any-return]


@part
def _swap(keys: Floats, entries: Ints, one: int, other: int) -> None:
    keys[one], keys[other] = keys[other], keys[one]
    for column in range(entries.shape[1]):
        entries[one, column], entries[other, column] = entries[other, column], entries[one, column]


@part
def _rise(keys: Floats, entries: Ints, at: int) -> None:
    while at > 0 and _before(keys, entries, at, (at - 1) // 2):
        _swap(keys, entries, at, (at - 1) // 2)
        at = (at - 1) // 2


@part
def _sink(keys: Floats, entries: Ints, size: int) -> None:
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and _before(keys, entries, child + 1, child):
            child += 1
        if not _before(keys, entries, child, at):
            return
        _swap(keys, entries, at, child)
        at = child


@part
def _candidates(tree: Header) -> tuple[Floats, Ints]:
    return _floats(tree[CANDIDATE_KEYS_AT], 3 * tree[CAPACITY]), _ints(tree[CANDIDATES_AT], 3 * tree[CAPACITY], 3)


@part
def _push(tree: Header, node: int, log_prob: float, place: int) -> None:
    keys, entries = _candidates(tree)
    at = tree[NUM_CANDIDATES]
    if at == len(keys):
        return  # it comes back with the next commit
    keys[at] = log_prob
    entries[at, NODE], entries[at, PLACE], entries[at, TIE] = node, place, tree[ORDER]
    tree[ORDER] += 1
    tree[NUM_CANDIDATES] += 1
    _rise(keys, entries, at)


@part
def _pop(tree: Header) -> None:
    keys, entries = _candidates(tree)
    tree[NUM_CANDIDATES] -= 1
    size = tree[NUM_CANDIDATES]
    _swap(keys, entries, 0, size)
    _sink(keys, entries, size)


# ---- the tree -------------------------------------------------------------------------------------------------------


@part
def _mix(prefix_hash: np.uint64, token: int) -> np.uint64:
    """As `hashing.mix`."""
    h = (prefix_hash ^ (np.uint64(token) + np.uint64(0x632BE59BD9B4E019))) * np.uint64(0xD6E8FEB86659FD93)
    return h ^ (h >> np.uint64(32))


@part
def _is_stop(tree: Header, token: int) -> bool:
    stops = numba.carray(pointer(tree[STOPS_AT]), (tree[NUM_STOPS],), np.int32)
    for stop in stops:  # noqa: SIM110 - numba knows no any()
        if stop == token:
            return True
    return False


@part
def _child(nodes: Ints, node: int, token: int) -> int:
    """The child for a token, or NONE."""
    child = nodes[node, FIRST_CHILD]
    while child != NONE and nodes[child, TOKEN] != token:
        child = nodes[child, NEXT_SIBLING]
    return child  # type: ignore[no-any-return]


@part
def _make(tree: Header, parent: int, token: int, log_prob: float) -> int:
    """A node; there must be room."""
    nodes, log_probs, hashes = _nodes(tree), _log_probs(tree), _hashes(tree)
    node = tree[NUM_NODES]
    tree[NUM_NODES] += 1
    nodes[node, TOKEN], nodes[node, PARENT] = token, parent
    nodes[node, FIRST_CHILD] = nodes[node, BRANCH] = nodes[node, RUN] = NONE
    nodes[node, NUM_LISTED] = nodes[node, NEXT_LISTED] = nodes[node, IS_RETRIEVED] = nodes[node, IS_FRESH] = 0
    nodes[node, AHEAD_FROM] = nodes[node, AHEAD_TO] = 0
    nodes[node, POSITION] = nodes[parent, POSITION] + 1
    nodes[node, NEXT_SIBLING] = nodes[parent, FIRST_CHILD]
    nodes[parent, FIRST_CHILD] = node
    hashes[node] = _mix(hashes[parent], token)
    log_probs[node] = log_probs[parent] + log_prob
    return node  # type: ignore[no-any-return]


@part
def _make_root(tree: Header, token: int, prefix_hash: np.uint64) -> None:
    nodes = _nodes(tree)
    nodes[0] = 0
    nodes[0, TOKEN], nodes[0, POSITION] = token, tree[LENGTH] - 1
    nodes[0, PARENT] = nodes[0, FIRST_CHILD] = nodes[0, NEXT_SIBLING] = nodes[0, BRANCH] = nodes[0, RUN] = NONE
    _hashes(tree)[0] = prefix_hash
    _log_probs(tree)[0] = 0.0
    tree[NUM_NODES] = 1


@part
def _may_go_on(tree: Header, nodes: Ints, node: int) -> bool:
    """Whether it is of use to know what follows the node."""
    return nodes[node, POSITION] + 1 < tree[MAX_LENGTH] and not _is_stop(tree, nodes[node, TOKEN])


@part
def _push_listed(tree: Header, node: int) -> None:
    """Make the first listed token from NEXT_LISTED on that may become a node a candidate."""
    nodes, (listed, listed_log_probs) = _nodes(tree), _listed(tree)
    if nodes[node, POSITION] + 2 >= tree[MAX_LENGTH]:
        return
    for place in range(nodes[node, NEXT_LISTED], nodes[node, NUM_LISTED]):
        token = listed[node, place]
        if _child(nodes, node, token) == NONE and not _is_stop(tree, token):
            nodes[node, NEXT_LISTED] = place
            _push(tree, node, _log_probs(tree)[node] + listed_log_probs[node, place], place)
            return
    nodes[node, NEXT_LISTED] = nodes[node, NUM_LISTED]


@part
def _child_of(tree: Header, node: int, token: int, log_prob: float) -> int:
    """The child for a token; made, with a log-probability given its parent, where there is none yet."""
    nodes = _nodes(tree)
    child = _child(nodes, node, token)
    if child == NONE:
        child = _make(tree, node, token, log_prob)
        if _may_go_on(tree, nodes, child):
            _push(tree, child, _log_probs(tree)[child], ITSELF)
    return child


@part
def _best(tree: Header, iteration: Header) -> bool:
    """Bring the best candidate that is worth a place in a forward to the head of the heap; False where there is none.

    What lies too deep is no candidate until the next commit.
    """
    nodes, log_probs = _nodes(tree), _log_probs(tree)
    keys, entries = _candidates(tree)
    listed, _ = _listed(tree)
    minimum = _floats(iteration[MINIMUM_AT], 2)[0]
    limit = min(tree[LENGTH] + tree[CHAIN_LENGTH] + iteration[NUM_SPECULATIVE], iteration[MAX_MODEL_LENGTH])
    if tree[NUM_NODES] == 0 or tree[NUM_CACHED] < tree[LENGTH]:
        return False
    while tree[NUM_CANDIDATES] > 0:
        node, place = entries[0, NODE], entries[0, PLACE]
        if place == ITSELF:
            if nodes[node, BRANCH] != NONE or node == 0:  # the root is committed text, and read as such
                _pop(tree)
                continue
            if keys[0] != log_probs[node]:  # the draft knew better, and the node was pushed again
                _pop(tree)
                continue
        elif _child(nodes, node, listed[node, place]) != NONE:
            _pop(tree)
            _push_listed(tree, node)
            continue
        if keys[0] - log_probs[0] < minimum:
            return False
        if nodes[node, POSITION] + (place != ITSELF) < limit:
            return True
        _pop(tree)
    return False


@part
def _take(tree: Header) -> int:
    """The node of the best candidate; no candidate any more."""
    nodes, (listed, listed_log_probs) = _nodes(tree), _listed(tree)
    _, entries = _candidates(tree)
    node, place = entries[0, NODE], entries[0, PLACE]
    _pop(tree)
    if place == ITSELF:
        return node  # type: ignore[no-any-return]
    nodes[node, NEXT_LISTED] = place + 1
    _push_listed(tree, node)
    return _make(tree, node, listed[node, place], listed_log_probs[node, place])


@part
def _rebuild_candidates(tree: Header) -> None:
    """All nodes that are not computed and may go on, and for each computed one the next that the draft listed."""
    nodes, log_probs = _nodes(tree), _log_probs(tree)
    tree[NUM_CANDIDATES] = tree[ORDER] = 0
    for node in range(tree[NUM_NODES]):
        if nodes[node, BRANCH] != NONE:
            _push_listed(tree, node)
        elif node > 0 and _may_go_on(tree, nodes, node):
            _push(tree, node, log_probs[node], ITSELF)


# ---- pages ----------------------------------------------------------------------------------------------------------


@part
def _branches(tree: Header) -> Ints:
    return _ints(tree[BRANCHES_AT], tree[CAPACITY] + 1, BRANCH_COLUMNS)


@part
def _table(tree: Header, branches: Ints, branch: int) -> tuple[Ints, int]:
    """Where a branch's own pages are, with room, and how many positions of the block table come before them."""
    if branch == 0:
        return _ints(tree[TRUNK_AT], 1, 2**31 - 1)[0], 0
    return _ints(tree[PAGES_AT], tree[CAPACITY] + 1, tree[BRANCH_PAGES])[branch], branches[branch, FIRST]


@part
def _page(tree: Header, branches: Ints, branch: int, index: int) -> int:
    """Entry of a branch's block table."""
    table, first = _table(tree, branches, branch if index >= branches[branch, FIRST] else 0)
    return table[index - first]  # type: ignore[no-any-return]


@part
def _truncate(tree: Header, pool: Header, branch: int, length: int) -> None:
    branches = _branches(tree)
    table, first = _table(tree, branches, branch)
    keep = max(0, (length + tree[PAGE_SIZE] - 1) // tree[PAGE_SIZE] - first)
    while branches[branch, NUM_BRANCH_PAGES] > keep:
        branches[branch, NUM_BRANCH_PAGES] -= 1
        release_page(pool, table[branches[branch, NUM_BRANCH_PAGES]])
    branches[branch, BRANCH_LENGTH] = min(branches[branch, BRANCH_LENGTH], length)


@part
def _append_page(tree: Header, branch: int, page: int) -> None:
    branches = _branches(tree)
    table, _ = _table(tree, branches, branch)
    table[branches[branch, NUM_BRANCH_PAGES]] = page
    branches[branch, NUM_BRANCH_PAGES] += 1


@part
def _note_copy(iteration: Header, source: int, destination: int, used: int) -> None:
    copies = _ints(iteration[COPIES_AT], iteration[MAX_RUNS], 3)
    at = iteration[NUM_COPIES]
    for i in range(iteration[NUM_COPIES]):
        # Where the source was itself copied a moment ago, in the same iteration, its original still says the same.
        if copies[i, 1] == source:
            source = copies[i, 0]
            break
    for i in range(iteration[NUM_COPIES]):
        if copies[i, 1] == destination:
            at = i
    copies[at, 0], copies[at, 1], copies[at, 2] = source, destination, used
    iteration[NUM_COPIES] = max(iteration[NUM_COPIES], at + 1)


@part
def _extend(tree: Header, pool: Header, iteration: Header, anchor: int, num_tokens: int) -> int:
    """A branch on which so many tokens are going to be written behind ``anchor`` (behind the cached text where NONE).

    NONE where there are not enough pages, and nothing changes then.
    """
    nodes, branches, size = _nodes(tree), _branches(tree), tree[PAGE_SIZE]
    branch, length, is_used_beyond = 0, tree[NUM_CACHED], tree[NUM_NODES] > 0 and nodes[0, BRANCH] != NONE
    if anchor != NONE:
        branch, length, is_used_beyond = nodes[anchor, BRANCH], nodes[anchor, POSITION] + 1, False
        child = nodes[anchor, FIRST_CHILD]
        while child != NONE and not is_used_beyond:
            is_used_beyond = nodes[child, BRANCH] == branch
            child = nodes[child, NEXT_SIBLING]
    own = branches[branch, BRANCH_LENGTH] == length or not is_used_beyond
    full, used = length // size, length % size
    copies_tail = used > 0 and (not own or num_holders(pool, _page(tree, branches, branch, full)) > 1)
    num_pages = (length + num_tokens + size - 1) // size
    num_new = num_pages - full - (1 if used > 0 and not copies_tail else 0)
    first = branches[branch, FIRST] if own else tree[NUM_CACHED] // size
    if num_new > num_available(pool) or (not (own and branch == 0) and num_pages - first > tree[BRANCH_PAGES]):
        return NONE
    tail = _page(tree, branches, branch, full) if copies_tail else NONE
    if own:
        _truncate(tree, pool, branch, length)
        if copies_tail:
            branches[branch, NUM_BRANCH_PAGES] -= 1
    else:
        source, branch = branch, tree[NUM_BRANCHES]
        tree[NUM_BRANCHES] += 1
        branches[branch, FIRST], branches[branch, NUM_HELD], branches[branch, NUM_BRANCH_PAGES] = first, 0, 0
        for index in range(first, full):
            page = _page(tree, branches, source, index)
            share_page(pool, page)
            _append_page(tree, branch, page)
    for index in range(num_new):
        page = take_page(pool)
        _append_page(tree, branch, page)
        if index == 0 and copies_tail:
            _note_copy(iteration, tail, page, used)
    if own and copies_tail:
        release_page(pool, tail)
    branches[branch, BRANCH_LENGTH] = length + num_tokens
    return branch  # type: ignore[no-any-return]


@part
def _forget(tree: Header, pool: Header, new_root: int, trunk: int) -> None:
    """Forget all nodes but the subtree of ``new_root`` (NONE: all); it moves together. ``trunk``: the branch of the text."""
    nodes, branches = _nodes(tree), _branches(tree)
    log_probs, hashes = _log_probs(tree), _hashes(tree)
    listed, listed_log_probs = _listed(tree)
    ahead, ahead_log_probs = _ahead(tree)
    num_kept = 0
    for node in range(tree[NUM_NODES]):
        parent = nodes[node, PARENT]
        is_kept = new_root != NONE and (node == new_root or (node > new_root and nodes[parent, MOVED_TO] != NONE))
        if not is_kept:
            nodes[node, MOVED_TO] = NONE
            if nodes[node, BRANCH] != NONE:
                branches[nodes[node, BRANCH], NUM_HELD] -= 1
            continue
        at, num_kept = num_kept, num_kept + 1  # never beyond a node that was not looked at yet
        parent = NONE if node == new_root else nodes[parent, MOVED_TO]
        nodes[node, MOVED_TO] = at
        if at != node:
            for column in range(MOVED_TO):
                nodes[at, column] = nodes[node, column]
            log_probs[at], hashes[at] = log_probs[node], hashes[node]
            for place in range(nodes[node, NUM_LISTED]):
                listed[at, place], listed_log_probs[at, place] = listed[node, place], listed_log_probs[node, place]
            for place in range(nodes[node, AHEAD_FROM], nodes[node, AHEAD_TO]):
                ahead[at, place], ahead_log_probs[at, place] = ahead[node, place], ahead_log_probs[node, place]
        nodes[at, PARENT], nodes[at, FIRST_CHILD], nodes[at, NEXT_SIBLING] = parent, NONE, NONE
        if parent != NONE:
            nodes[at, NEXT_SIBLING] = nodes[parent, FIRST_CHILD]
            nodes[parent, FIRST_CHILD] = at
    tree[NUM_NODES] = num_kept
    _gather_branches(tree, pool, trunk)


@part
def _gather_branches(tree: Header, pool: Header, trunk: int) -> None:
    """Free the branches that no node lies on, make ``trunk`` branch 0, and let the others move together."""
    nodes, branches = _nodes(tree), _branches(tree)
    for branch in range(1, tree[NUM_BRANCHES]):
        if branches[branch, NUM_HELD] == 0 and branch != trunk:
            _truncate(tree, pool, branch, 0)
    if trunk != 0:
        # No node lies on the old trunk behind the text. Whoever is the trunk holds the pages of the text.
        _truncate(tree, pool, 0, branches[trunk, FIRST] * tree[PAGE_SIZE])
        table, _ = _table(tree, branches, trunk)
        for index in range(branches[trunk, NUM_BRANCH_PAGES]):
            _append_page(tree, 0, table[index])
        branches[0, BRANCH_LENGTH], branches[0, NUM_HELD] = branches[trunk, BRANCH_LENGTH], branches[trunk, NUM_HELD]
        branches[trunk, NUM_HELD] = 0
    pages = _ints(tree[PAGES_AT], tree[CAPACITY] + 1, tree[BRANCH_PAGES])
    branches[0, BRANCH_MOVED_TO], num_kept = 0, 1
    for branch in range(1, tree[NUM_BRANCHES]):
        branches[branch, BRANCH_MOVED_TO] = 0  # the trunk now, or nobody's
        if branches[branch, NUM_HELD] == 0:
            continue
        branches[branch, BRANCH_MOVED_TO] = num_kept
        for column in range(BRANCH_MOVED_TO):
            branches[num_kept, column] = branches[branch, column]
        for index in range(branches[branch, NUM_BRANCH_PAGES]):
            pages[num_kept, index] = pages[branch, index]
        num_kept += 1
    for node in range(tree[NUM_NODES]):
        if nodes[node, BRANCH] != NONE:
            nodes[node, BRANCH] = branches[nodes[node, BRANCH], BRANCH_MOVED_TO]
    tree[NUM_BRANCHES] = num_kept


# ---- what Python calls: the text ------------------------------------------------------------------------------------


def commit(tree_at: int, pool_at: int, num_new: int, prefix_hash: int) -> int:
    """Re-root at the text's end, whose last ``num_new`` tokens are new; returns how many of them the tree had foreseen."""
    tree, pool = header_at(tree_at, TREE_LENGTH), header_at(pool_at, POOL_LENGTH)
    nodes = _nodes(tree)
    text = numba.carray(pointer(tree[TEXT_AT]), (tree[LENGTH],), np.int32)
    node, matched = (0 if tree[NUM_NODES] > 0 else NONE), 0
    while node != NONE and matched < num_new:
        child = _child(nodes, node, text[tree[LENGTH] - num_new + matched])
        if child == NONE:
            break
        node, matched = child, matched + 1
    cached, trunk = node, 0
    while cached != NONE and nodes[cached, BRANCH] == NONE:
        cached = nodes[cached, PARENT]
    if cached != NONE:
        trunk, tree[NUM_CACHED] = nodes[cached, BRANCH], nodes[cached, POSITION] + 1
    _forget(tree, pool, node if matched == num_new else NONE, trunk)
    if tree[NUM_NODES] == 0:
        _make_root(tree, text[tree[LENGTH] - 1], np.uint64(prefix_hash))
    tree[NUM_EXPANDED] = tree[CHAIN_LENGTH] = 0
    _rebuild_candidates(tree)
    return matched


def forget_all(tree_at: int, pool_at: int) -> None:
    """No node is left, nor any branch but the trunk."""
    tree = header_at(tree_at, TREE_LENGTH)
    _forget(tree, header_at(pool_at, POOL_LENGTH), NONE, 0)
    tree[NUM_CANDIDATES] = 0


def make_root(tree_at: int, token: int, prefix_hash: int) -> None:
    """The root of a tree without nodes."""
    _make_root(header_at(tree_at, TREE_LENGTH), token, np.uint64(prefix_hash))


def truncate(tree_at: int, pool_at: int, length: int) -> None:
    """Give back the trunk's pages behind so many positions."""
    _truncate(header_at(tree_at, TREE_LENGTH), header_at(pool_at, POOL_LENGTH), 0, length)


def append_page(tree_at: int, page: int) -> None:
    """To the trunk."""
    _append_page(header_at(tree_at, TREE_LENGTH), 0, page)


def follow(tree_at: int, num_tokens: int, tokens_at: int, log_probs_at: int) -> None:
    """Take note of the chain that the target verifies: int32 and float64 [num_tokens]; there must be room for its nodes."""
    tree = header_at(tree_at, TREE_LENGTH)
    tokens, log_probs = _ints(tokens_at, 1, num_tokens)[0], _floats(log_probs_at, num_tokens)
    tree[CHAIN_LENGTH] = num_tokens
    node = 0
    for i in range(num_tokens):
        node = _child_of(tree, node, tokens[i], log_probs[i])


def retrieved(tree_at: int, node: int, num_tokens: int, tokens_at: int, log_probs_at: int) -> None:
    """Note what was retrieved behind a node: int32 and float32 [num_tokens]."""
    tree = header_at(tree_at, TREE_LENGTH)
    nodes, (ahead, ahead_log_probs) = _nodes(tree), _ahead(tree)
    tokens, log_probs = _ints(tokens_at, 1, num_tokens)[0], numba.carray(pointer(log_probs_at), (num_tokens,), np.float32)
    nodes[node, AHEAD_FROM], nodes[node, AHEAD_TO] = 0, num_tokens
    for i in range(num_tokens):
        ahead[node, i], ahead_log_probs[node, i] = tokens[i], log_probs[i]


def path_to(tree_at: int, node: int, path_at: int) -> int:
    """Write the tokens behind the root up to and including the node, int32; returns how many."""
    tree = header_at(tree_at, TREE_LENGTH)
    nodes = _nodes(tree)
    length = nodes[node, POSITION] - nodes[0, POSITION]
    path = _ints(path_at, 1, length)[0]
    for i in range(length):
        path[length - 1 - i] = nodes[node, TOKEN]
        node = nodes[node, PARENT]
    return length  # type: ignore[no-any-return]


# ---- what Python calls: an iteration --------------------------------------------------------------------------------


def waiting(iteration_at: int, out_at: int) -> int:
    """Write the trees whose text the draft has yet to read, int32; returns how many.

    It cannot help where the text has ended, or is as long as it can read or as the request can get.
    """
    iteration = header_at(iteration_at, ITERATION_LENGTH)
    out, found = _ints(out_at, 1, iteration[NUM_TREES])[0], 0
    for index in range(iteration[NUM_TREES]):
        tree = _tree_at(iteration, index)
        longest = min(tree[MAX_LENGTH], iteration[MAX_MODEL_LENGTH])
        if tree[NUM_CACHED] < tree[LENGTH] < longest and not tree[HAS_ENDED]:
            out[found] = index
            found += 1
    return found


def read(iteration_at: int, pool_at: int, index: int, num_tokens: int, reads_root: int) -> int:
    """Make a run of so many tokens of a text, behind what is cached of it; the root is the last one. 0: no pages."""
    iteration = header_at(iteration_at, ITERATION_LENGTH)
    tree = _tree_at(iteration, index)
    start = tree[NUM_CACHED]
    branch = _extend(tree, header_at(pool_at, POOL_LENGTH), iteration, NONE, num_tokens)
    if branch == NONE:
        return 0
    run = _add_run(iteration, index, branch, start)
    _ints(iteration[RUNS_AT], iteration[MAX_RUNS], 6)[run, NUM_TEXT] = num_tokens - reads_root
    iteration[NUM_TOKENS] += num_tokens - reads_root
    tree[NUM_CACHED] += num_tokens
    if reads_root:
        _add_node(iteration, tree, run, branch, 0)
    return 1


@part
def _add_run(iteration: Header, index: int, branch: int, start: int) -> int:
    runs, run = _ints(iteration[RUNS_AT], iteration[MAX_RUNS], 6), iteration[NUM_RUNS]
    runs[run, TREE], runs[run, RUN_BRANCH], runs[run, START] = index, branch, start
    runs[run, NUM_TEXT] = runs[run, NUM_RUN_NODES] = 0
    iteration[NUM_RUNS] += 1
    return run  # type: ignore[no-any-return]


@part
def _add_node(iteration: Header, tree: Header, run: int, branch: int, node: int) -> None:
    """The node's key and value lie on the branch from the forward on."""
    nodes, runs = _nodes(tree), _ints(iteration[RUNS_AT], iteration[MAX_RUNS], 6)
    nodes[node, BRANCH], nodes[node, RUN], nodes[node, IS_FRESH] = branch, run, 1
    _branches(tree)[branch, NUM_HELD] += 1
    runs[run, NUM_RUN_NODES] += 1
    runs[run, TIP] = node
    tree[NUM_EXPANDED] += 1
    iteration[NUM_TOKENS] += 1
    iteration[NUM_OUTPUTS] += 1


@part
def _add(iteration: Header, pool: Header, index: int, node: int) -> int:
    """Give a node a place in the forward; returns how many, or NONE where there are not enough pages."""
    tree = _tree_at(iteration, index)
    nodes = _nodes(tree)
    parent = nodes[node, PARENT]
    run = nodes[parent, RUN]
    if run == NONE and (nodes[parent, BRANCH] == NONE or nodes[parent, IS_FRESH]):
        _put_back(tree, node)  # its parent's key and value come with this very forward
        return 0
    branch = _extend(tree, pool, iteration, parent, 1)
    if branch == NONE:
        _put_back(tree, node)
        return NONE
    if run == NONE:
        run = _add_run(iteration, index, branch, nodes[node, POSITION])
    else:
        nodes[parent, RUN] = NONE  # a path that is already given (a chain, retrieved tokens) is read in one forward
    _add_node(iteration, tree, run, branch, node)
    return 1


@part
def _put_back(tree: Header, node: int) -> None:
    """Make a node a candidate again when the iteration is chosen."""
    _, entries = _candidates(tree)
    tree[NUM_PUT_BACK] += 1
    entries[len(entries) - tree[NUM_PUT_BACK], NODE] = node


@part
def _look_ahead(tree: Header, node: int) -> None:
    """Make the next token that was retrieved behind a node its child, and the others the child's."""
    nodes, (ahead, ahead_log_probs) = _nodes(tree), _ahead(tree)
    place, end = nodes[node, AHEAD_FROM], nodes[node, AHEAD_TO]
    if place == end or nodes[node, FIRST_CHILD] != NONE:
        return
    child = _child_of(tree, node, ahead[node, place], ahead_log_probs[node, place])
    nodes[child, IS_RETRIEVED] = 1
    nodes[node, AHEAD_FROM] = nodes[node, AHEAD_TO] = 0
    nodes[child, AHEAD_FROM], nodes[child, AHEAD_TO] = place + 1, end
    for i in range(place + 1, end):
        ahead[child, i], ahead_log_probs[child, i] = ahead[node, i], ahead_log_probs[node, i]


def look_ahead(tree_at: int, node: int) -> None:
    """As `_look_ahead`."""
    _look_ahead(header_at(tree_at, TREE_LENGTH), node)


@part
def _asks(iteration: Header, tree: Header, index: int, node: int) -> bool:
    """Whether a source is to be asked for what follows a likely node: nothing does yet, and what would is not too deep."""
    nodes, log_probs = _nodes(tree), _log_probs(tree)
    if log_probs[node] - log_probs[0] < _floats(iteration[MINIMUM_AT], 2)[1]:
        return False
    if not iteration[HAS_SOURCES] or nodes[node, FIRST_CHILD] != NONE or nodes[node, AHEAD_FROM] < nodes[node, AHEAD_TO]:
        return False
    room = tree[LENGTH] + tree[CHAIN_LENGTH] + iteration[NUM_SPECULATIVE] - nodes[node, POSITION] - 1
    iteration[ASKED_TREE], iteration[ASKED_NODE], iteration[ASKED_ROOM] = index, node, min(room, MAX_AHEAD)
    return bool(room > 0)


def ask(iteration_at: int, index: int, node: int) -> int:
    """As `_asks`."""
    iteration = header_at(iteration_at, ITERATION_LENGTH)
    return int(_asks(iteration, _tree_at(iteration, index), index, node))


@part
def _enqueue(iteration: Header, index: int) -> None:
    tree = _tree_at(iteration, index)
    if not _best(tree, iteration):
        return
    keys, entries = _floats(iteration[QUEUE_KEYS_AT], iteration[NUM_TREES]), _ints(iteration[QUEUE_AT], iteration[NUM_TREES], 3)
    at = iteration[NUM_QUEUED]
    keys[at] = _candidates(tree)[0][0] - _log_probs(tree)[0] + (0.0 if tree[NUM_EXPANDED] > 0 else _UNSERVED)
    entries[at, NODE] = entries[at, TIE] = index
    iteration[NUM_QUEUED] += 1
    _rise(keys, entries, at)


@part
def _dequeue(iteration: Header) -> int:
    keys, entries = _floats(iteration[QUEUE_KEYS_AT], iteration[NUM_TREES]), _ints(iteration[QUEUE_AT], iteration[NUM_TREES], 3)
    index = entries[0, NODE]
    iteration[NUM_QUEUED] -= 1
    size = iteration[NUM_QUEUED]
    _swap(keys, entries, 0, size)
    _sink(keys, entries, size)
    return index  # type: ignore[no-any-return]


def select(iteration_at: int, pool_at: int) -> int:
    """Choose the most probable nodes for the forward, one after the other; returns what `_tree_steps` says of DONE and so on.

    Called again, with what was retrieved noted, it goes on behind the node that it asked for.
    """
    iteration, pool = header_at(iteration_at, ITERATION_LENGTH), header_at(pool_at, POOL_LENGTH)
    keys = _floats(iteration[QUEUE_KEYS_AT], iteration[NUM_TREES])
    if iteration[NUM_QUEUED] == NOT_BEGUN:
        for index in range(iteration[NUM_TREES]):
            tree = _tree_at(iteration, index)
            # Each node that is taken may be new, and have a new child that was retrieved.
            if tree[NUM_NODES] + 2 * (iteration[BUDGET] + 1) > tree[CAPACITY]:
                iteration[ASKED_TREE] = index
                return FULL
        iteration[NUM_QUEUED] = 0
        for index in range(iteration[NUM_TREES]):
            _enqueue(iteration, index)
    else:
        _look_ahead(_tree_at(iteration, iteration[ASKED_TREE]), iteration[ASKED_NODE])
        _enqueue(iteration, iteration[ASKED_TREE])
    outcome = DONE
    while iteration[NUM_QUEUED] > 0 and (iteration[BUDGET] > 0 or keys[0] > 0.5 * _UNSERVED):
        index = _dequeue(iteration)
        tree = _tree_at(iteration, index)
        node = _take(tree)
        added = _add(iteration, pool, index, node)
        if added == NONE:
            outcome = STARVED
            break
        if added:
            iteration[BUDGET] -= 1
            if _asks(iteration, tree, index, node):
                return ASKS
            _look_ahead(tree, node)
        _enqueue(iteration, index)
    for index in range(iteration[NUM_TREES]):
        tree = _tree_at(iteration, index)
        _, entries = _candidates(tree)
        while tree[NUM_PUT_BACK] > 0:
            node = entries[len(entries) - tree[NUM_PUT_BACK], NODE]
            tree[NUM_PUT_BACK] -= 1
            _push(tree, node, _log_probs(tree)[node], ITSELF)
    return outcome


def lay_out(
    iteration_at: int, token_ids_at: int, starts_at: int, query_start_at: int, num_outputs_at: int, pages_at: int, width: int
) -> None:
    """Fill the forward's batch: int64 [tokens], int32 [rows], [rows + 1], [rows] and [rows, width]; see `base.Batch`."""
    iteration = header_at(iteration_at, ITERATION_LENGTH)
    num_runs = iteration[NUM_RUNS]
    token_ids = numba.carray(pointer(token_ids_at), (iteration[NUM_TOKENS],), np.int64)
    starts, num_outputs = _ints(starts_at, 1, num_runs)[0], _ints(num_outputs_at, 1, num_runs)[0]
    query_start, pages = _ints(query_start_at, 1, num_runs + 1)[0], _ints(pages_at, num_runs, width)
    outputs, runs = _ints(iteration[OUTPUTS_AT], iteration[MAX_RUNS], 2), _ints(iteration[RUNS_AT], iteration[MAX_RUNS], 6)
    at, output = 0, 0
    query_start[0] = 0
    for run in range(num_runs):
        tree = _tree_at(iteration, runs[run, TREE])
        nodes, branches, branch = _nodes(tree), _branches(tree), runs[run, RUN_BRANCH]
        text = numba.carray(pointer(tree[TEXT_AT]), (tree[LENGTH],), np.int32)
        starts[run], num_outputs[run] = runs[run, START], runs[run, NUM_RUN_NODES]
        for i in range(runs[run, NUM_TEXT]):
            token_ids[at + i] = text[runs[run, START] + i]
        at, output = at + runs[run, NUM_TEXT] + runs[run, NUM_RUN_NODES], output + runs[run, NUM_RUN_NODES]
        node = runs[run, TIP]
        for i in range(runs[run, NUM_RUN_NODES]):
            token_ids[at - 1 - i] = nodes[node, TOKEN]
            outputs[output - 1 - i, 0], outputs[output - 1 - i, 1] = runs[run, TREE], node
            node = nodes[node, PARENT]
        query_start[run + 1] = at
        table, first = _table(tree, branches, branch)
        trunk, _ = _table(tree, branches, 0)
        for index in range(first):
            pages[run, index] = trunk[index]
        for index in range(branches[branch, NUM_BRANCH_PAGES]):
            pages[run, first + index] = table[index]


def expand(
    iteration_at: int, num_listed: int, tokens_at: int, probs_at: int, log_probs_at: int, records_at: int, num_told: int
) -> None:
    """Note what the draft says behind the forward's nodes: int32, float32 and float32 [outputs, num_listed], best first.

    Of a retrieved child the draft knows better. Fills the records, `messages.NODE_DTYPE`, in words of 4 bytes.
    """
    iteration = header_at(iteration_at, ITERATION_LENGTH)
    shape = (iteration[NUM_OUTPUTS], num_listed)
    outputs, tokens = _ints(iteration[OUTPUTS_AT], iteration[MAX_RUNS], 2), numba.carray(pointer(tokens_at), shape, np.int32)
    probs = numba.carray(pointer(probs_at), shape, np.int32)  # their bits
    said = numba.carray(pointer(log_probs_at), shape, np.float32)
    words = _ints(records_at, iteration[NUM_OUTPUTS], RECORD_WORDS)
    names = numba.carray(pointer(records_at), (iteration[NUM_OUTPUTS], RECORD_WORDS // 2), np.uint64)
    for output in range(iteration[NUM_OUTPUTS]):
        tree, node = _tree_at(iteration, outputs[output, 0]), outputs[output, 1]
        nodes, log_probs, (listed, listed_log_probs) = _nodes(tree), _log_probs(tree), _listed(tree)
        if nodes[node, IS_RETRIEVED]:
            iteration[NUM_RETRIEVED] += 1
            iteration[NUM_CONFIRMED] += listed[nodes[node, PARENT], 0] == nodes[node, TOKEN]
        nodes[node, RUN], nodes[node, IS_FRESH] = NONE, 0
        nodes[node, NUM_LISTED], nodes[node, NEXT_LISTED] = num_listed, 0
        for place in range(num_listed):
            listed[node, place], listed_log_probs[node, place] = tokens[output, place], said[output, place]
        child, unsaid = nodes[node, FIRST_CHILD], 1.0
        if child != NONE:
            for place in range(num_listed):
                unsaid -= math.exp(np.float64(said[output, place]))
        while child != NONE:
            if nodes[child, IS_RETRIEVED]:
                log_prob = min(float(said[output, num_listed - 1]), math.log(max(unsaid, 1e-9)))
                for place in range(num_listed):
                    if tokens[output, place] == nodes[child, TOKEN]:
                        log_prob = said[output, place]
                log_probs[child] = log_probs[node] + log_prob
                if nodes[child, BRANCH] == NONE and _may_go_on(tree, nodes, child):
                    _push(tree, child, log_probs[child], ITSELF)
            child = nodes[child, NEXT_SIBLING]
        _push_listed(tree, node)
        names[output, 0], names[output, 1] = np.uint64(tree[HANDLE]), _hashes(tree)[node]
        words[output, 4], words[output, 5] = nodes[node, POSITION] + 1, num_told
        for place in range(num_told):
            words[output, 6 + place] = tokens[output, place]
            words[output, 6 + MAX_TOLD + place] = probs[output, place]


class Steps(NamedTuple):
    """Addresses first; see the functions."""

    commit: Callable[[int, int, int, int], int]
    forget_all: Callable[[int, int], None]
    make_root: Callable[[int, int, int], None]
    truncate: Callable[[int, int, int], None]
    append_page: Callable[[int, int], None]
    follow: Callable[[int, int, int, int], None]
    retrieved: Callable[[int, int, int, int, int], None]
    path_to: Callable[[int, int, int], int]
    waiting: Callable[[int, int], int]
    read: Callable[[int, int, int, int, int], int]
    look_ahead: Callable[[int, int], None]
    ask: Callable[[int, int, int], int]
    select: Callable[[int, int], int]
    lay_out: Callable[[int, int, int, int, int, int, int], None]
    expand: Callable[[int, int, int, int, int, int, int], None]


@functools.cache
def steps() -> Steps:
    """The compiled functions; compiles them, or loads what an earlier process compiled, once."""
    return Steps(
        of_numbers(commit, 4, "int64"),
        of_numbers(forget_all, 2, "void"),
        of_numbers(make_root, 3, "void"),
        of_numbers(truncate, 3, "void"),
        of_numbers(append_page, 2, "void"),
        of_numbers(follow, 4, "void"),
        of_numbers(retrieved, 5, "void"),
        of_numbers(path_to, 3, "int64"),
        of_numbers(waiting, 2, "int64"),
        of_numbers(read, 5, "int64"),
        of_numbers(look_ahead, 2, "void"),
        of_numbers(ask, 3, "int64"),
        of_numbers(select, 2, "int64"),
        of_numbers(lay_out, 7, "void"),
        of_numbers(expand, 7, "void"),
    )
