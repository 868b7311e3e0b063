"""A request's tree: the nodes behind its text, how they come and go, and what a commit does to them."""

import math

import numpy as np

from vllm_double.draft.arena import NONE, Arena, Floats, Forward, Ints, Records, integer
from vllm_double.draft.branches import append_page, free_branch, let_go, make_trunk, new_branch, truncate
from vllm_double.draft.candidates import push
from vllm_double.draft.page_pool import share_page
from vllm_double.jit import view_part

__all__ = [
    "MISFIT", "admit", "adopt", "child_for", "commit", "following", "free_node", "list_next", "look_ahead", "may_go_on",
    "new_child", "release",
]  # fmt: skip

MISFIT = -1
"""What `commit` returns if something of the text was lost on the way, or the draft does not know one of its tokens."""


# ---- nodes ----------------------------------------------------------------------------------------------------------


@view_part
def _mix(prefix_hash: np.uint64, token: int) -> np.uint64:
    """As `prefix_hash.mix`."""
    h = (prefix_hash ^ (np.uint64(token) + np.uint64(0x632BE59BD9B4E019))) * np.uint64(0xD6E8FEB86659FD93)
    return h ^ (h >> np.uint64(32))


@view_part
def _is_stop(arena: Arena, slot: int, token: int) -> bool:
    for index in range(arena.requests[slot].num_stops):  # noqa: SIM110 - numba knows no any()
        if arena.stops[slot, index] == token:
            return True
    return False


@view_part
def child_for(nodes: Records, node: int, token: int) -> int:
    """The child for a token, or NONE."""
    child = nodes[node].first_child
    while child != NONE and nodes[child].token != token:
        child = nodes[child].next_sibling
    return child  # type: ignore[no-any-return]


@view_part
def following(nodes: Records, node: int, top: int) -> int:
    """The next of the nodes behind ``top``, parents before their children; NONE behind the last."""
    if nodes[node].first_child != NONE:
        return nodes[node].first_child  # type: ignore[no-any-return]
    while node != top and nodes[node].next_sibling == NONE:
        node = nodes[node].parent
    return NONE if node == top else nodes[node].next_sibling


@view_part
def may_go_on(arena: Arena, node: int) -> bool:
    """Whether it is of use to know what follows the node."""
    slot, position, token = arena.nodes[node].slot, arena.nodes[node].position, arena.nodes[node].token
    return position + 1 < arena.requests[slot].max_length and not _is_stop(arena, slot, token)


@view_part
def _new_node(arena: Arena, slot: int, token: int, position: int) -> int:
    """NONE: no node is free."""
    totals, node = arena.totals[0], arena.totals[0].free_node
    if node == NONE:
        return NONE
    made = arena.nodes[node]
    totals.free_node = made.next_sibling
    totals.num_free_nodes -= 1
    made.slot, made.token, made.position = slot, token, position
    made.parent = made.first_child = made.next_sibling = made.branch = made.run = NONE
    made.num_listed = made.next_listed = made.ahead_from = made.ahead_to = 0
    made.is_candidate = made.is_retrieved = made.is_picked = made.is_tip = made.is_fresh = False
    return node  # type: ignore[no-any-return]


@view_part
def new_child(arena: Arena, parent: int, token: int, log_prob: float) -> int:
    """A node behind another, with a log-probability given that one; NONE if none is free."""
    nodes = arena.nodes
    node = _new_node(arena, nodes[parent].slot, token, nodes[parent].position + 1)
    if node != NONE:
        nodes[node].parent, nodes[node].next_sibling = parent, nodes[parent].first_child
        nodes[parent].first_child = node
        nodes[node].hash = _mix(nodes[parent].hash, token)
        nodes[node].log_prob = nodes[parent].log_prob + log_prob
    return node


@view_part
def _child_of(arena: Arena, parent: int, token: int, log_prob: float) -> int:
    """The child for a token; made, with a log-probability given its parent, if there is none yet."""
    child = child_for(arena.nodes, parent, token)
    if child == NONE:
        child = new_child(arena, parent, token, log_prob)
        if child != NONE and may_go_on(arena, child):
            push(arena.nodes, arena.requests, child, arena.nodes[child].log_prob)
    return child


@view_part
def list_next(arena: Arena, node: int) -> None:
    """Make a computed node stand for the next token of its list that may become a node."""
    nodes, slot = arena.nodes, arena.nodes[node].slot
    if nodes[node].position + 2 >= arena.requests[slot].max_length:
        return
    for place in range(nodes[node].next_listed, nodes[node].num_listed):
        token = arena.listed[node, place].token
        if child_for(nodes, node, token) == NONE and not _is_stop(arena, slot, token):
            nodes[node].next_listed = place
            push(nodes, arena.requests, node, nodes[node].log_prob + math.log(max(arena.listed[node, place].prob, 1e-9)))
            return
    nodes[node].next_listed = nodes[node].num_listed


@view_part
def look_ahead(arena: Arena, node: int) -> None:
    """Make the next token that was retrieved behind a node its child, and the others the child's."""
    nodes, ahead = arena.nodes, arena.ahead
    place, end = nodes[node].ahead_from, nodes[node].ahead_to
    if place == end or nodes[node].first_child != NONE:
        return
    child = _child_of(arena, node, ahead[node, place].token, ahead[node, place].log_prob)
    if child == NONE:
        return
    nodes[child].is_retrieved = True
    nodes[node].ahead_from = nodes[node].ahead_to = 0
    nodes[child].ahead_from, nodes[child].ahead_to = place + 1, end
    for index in range(place + 1, end):
        ahead[child, index].token, ahead[child, index].log_prob = ahead[node, index].token, ahead[node, index].log_prob


# ---- how nodes go ---------------------------------------------------------------------------------------------------


@view_part
def free_node(arena: Arena, node: int, spared: int) -> None:
    """A node without children that no other leads to. ``spared``: a branch that is not freed."""
    nodes, totals = arena.nodes, arena.totals[0]
    if nodes[node].branch != NONE:
        let_go(arena, node, spared)
    nodes[node].slot, nodes[node].next_sibling = NONE, totals.free_node
    totals.free_node = node
    totals.num_free_nodes += 1


@view_part
def _keep_below(arena: Arena, slot: int, new_root: int, spared: int) -> None:
    """Free all nodes but ``new_root`` (NONE: none is kept) and those behind it, which are the candidates again."""
    nodes, request = arena.nodes, arena.requests[slot]
    node = request.root if request.root != new_root else NONE
    while node != NONE:  # down to a leaf, which goes, and up again
        child = nodes[node].first_child
        if child == NONE:
            parent = nodes[node].parent
            free_node(arena, node, spared)
            node = parent
            continue
        nodes[node].first_child = nodes[child].next_sibling
        if child != new_root:
            node = child
    request.root, request.best = new_root, NONE
    if new_root != NONE:
        nodes[new_root].parent = nodes[new_root].next_sibling = NONE
        _gather_candidates(arena, slot)


@view_part
def _gather_candidates(arena: Arena, slot: int) -> None:
    """All nodes that are not computed and may go on, and the computed ones for the next that the draft listed."""
    nodes, root = arena.nodes, arena.requests[slot].root
    node = root
    while node != NONE:
        nodes[node].is_candidate = False
        if nodes[node].branch != NONE:
            list_next(arena, node)
        elif node != root and may_go_on(arena, node):
            push(nodes, arena.requests, node, nodes[node].log_prob)
        node = following(nodes, node, root)


@view_part
def _make_root(arena: Arena, slot: int) -> bool:
    """For the text's last token. False if no node is free."""
    request = arena.requests[slot]
    root = _new_node(arena, slot, arena.texts[slot, request.length - 1], request.length - 1)
    if root == NONE:
        return False
    arena.nodes[root].hash, arena.nodes[root].log_prob = request.hash, 0.0
    request.root = root
    return True


# ---- the text -------------------------------------------------------------------------------------------------------


@view_part
def _recompute_from(arena: Arena, slot: int, length: int) -> None:
    """Have the committed text read again from ``length`` on, and all of a page that is in the prefix cache."""
    request, size = arena.requests[slot], arena.limits[0].page_size
    if length < request.num_inserted * size:
        request.num_inserted = length // size
        length = request.num_inserted * size
    request.num_cached = min(request.num_cached, length)
    truncate(arena, request.trunk, request.num_cached)


@view_part
def _rewind(arena: Arena, slot: int, keep: int) -> None:
    """Back to so many tokens, the text at admission or more."""
    request = arena.requests[slot]
    _keep_below(arena, slot, NONE, request.trunk)
    _recompute_from(arena, slot, keep)
    request.hash = _mix(np.uint64(0x9E3779B97F4A7C15), request.handle)
    for index in range(request.num_admitted, keep):
        request.hash = _mix(request.hash, arena.texts[slot, index])


@view_part
def _re_root(arena: Arena, forward: Forward, slot: int, tokens: Ints) -> int:
    """Follow the tokens down the tree, of which only what is behind them is kept; returns how many of them were foreseen."""
    nodes, request, lessons = arena.nodes, arena.requests[slot], forward.lessons
    node, cached, num_foreseen, num_lessons = request.root, NONE, 0, 0
    while node != NONE:
        if nodes[node].branch != NONE:
            cached = node
        if num_foreseen == len(tokens):
            break
        token = tokens[num_foreseen]
        if request.is_sampled and nodes[node].num_listed > 0 and num_lessons < len(lessons):
            lesson = lessons[num_lessons]
            lesson.node, lesson.num_listed, lesson.drawn = node, nodes[node].num_listed, token
            num_lessons += 1
        child = child_for(nodes, node, token)
        if child == NONE:
            node = NONE
        else:
            node, num_foreseen = child, num_foreseen + 1
    forward.progress[0].num_lessons = num_lessons
    trunk = request.trunk
    if cached != NONE:
        trunk, request.num_cached = nodes[cached].branch, nodes[cached].position + 1
    _keep_below(arena, slot, node, trunk)
    make_trunk(arena, slot, trunk)
    return num_foreseen


@view_part
def _follow(arena: Arena, slot: int, chain: Ints, chain_probs: Floats) -> None:
    """Take note of the draft tokens that the target verifies, with a probability each given those before."""
    for token in chain:
        if token < 0 or token >= arena.limits[0].vocab_size:
            return
    node, request = arena.requests[slot].root, arena.requests[slot]
    request.chain_length = min(len(chain), arena.limits[0].num_speculative_tokens)
    for index in range(request.chain_length):
        node = _child_of(arena, node, chain[index], math.log(min(max(chain_probs[index], 1e-9), 1.0)))
        if node == NONE:
            return


def commit(
    arena: Arena, forward: Forward, slot: int, keep: int, waits: int, tokens: Ints, chain: Ints, chain_probs: Floats
) -> int:
    """Make the text ``text[:keep] + tokens``, and follow the chain; returns how many of ``tokens`` were foreseen, or MISFIT.

    There must be room for the text, and a free node for the root and for each token of the chain.
    """
    request = arena.requests[slot]
    forward.progress[0].num_lessons = 0
    if keep > request.length or (keep < request.length and keep < request.num_admitted):
        return MISFIT
    for token in tokens:
        if token < 0 or token >= arena.limits[0].vocab_size:
            return MISFIT
    if keep < request.length:
        _rewind(arena, slot, keep)
    for index in range(len(tokens)):
        arena.texts[slot, keep + index] = tokens[index]
        if keep + index >= request.num_admitted:
            request.hash = _mix(request.hash, tokens[index])
    request.length = keep + len(tokens)
    if request.length < request.num_admitted or request.length == 0:
        return 0  # the text at admission is still arriving
    # A prompt may end with a stop token.
    last = arena.texts[slot, request.length - 1]
    request.has_ended = request.length > request.num_admitted and _is_stop(arena, slot, last)
    num_foreseen = _re_root(arena, forward, slot, tokens)
    if request.root == NONE and not _make_root(arena, slot):
        return MISFIT
    request.num_expanded = request.chain_length = 0
    request.is_awaited = waits != 0
    _follow(arena, slot, chain, chain_probs)
    return num_foreseen


def admit(arena: Arena, slot: int) -> None:
    """Begin with an empty text. The fields that the target says are set."""
    request = arena.requests[slot]
    request.hash = _mix(np.uint64(0x9E3779B97F4A7C15), request.handle)
    request.length = request.chain_length = request.num_cached = request.num_inserted = request.num_expanded = 0
    request.root = request.best = NONE
    request.has_ended = request.is_awaited = False
    request.trunk = new_branch(arena, slot, request.num_cached)
    request.is_live = True


def release(arena: Arena, slot: int) -> None:
    """Give back all nodes and pages, the text's too."""
    request = arena.requests[slot]
    _keep_below(arena, slot, NONE, request.trunk)
    truncate(arena, request.trunk, integer(0))
    free_branch(arena, request.trunk)
    request.is_live = False


def adopt(arena: Arena, slot: int, pages: Ints) -> None:
    """Share pages of the prefix cache, which hold the text from where the cached text's last full page ends."""
    request, size = arena.requests[slot], arena.limits[0].page_size
    truncate(arena, request.trunk, request.num_cached - request.num_cached % size)
    for index in range(len(pages)):
        page = integer(pages[index])
        share_page(arena.pages, arena.totals, page)
        append_page(arena, request.trunk, page)
    request.num_inserted = arena.branches[request.trunk].num_pages
    request.num_cached = arena.branches[request.trunk].length = request.num_inserted * size
