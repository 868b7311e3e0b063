"""Which nodes the next forward takes: texts that the draft has yet to read, then the most probable candidates."""

import math

import numpy as np

from vllm_double.draft.arena import MAX_AHEAD, NONE, Arena, Forward
from vllm_double.draft.branches import extend, hold
from vllm_double.draft.candidates import push, remove
from vllm_double.draft.request_tree import child_for, list_next, look_ahead, new_child
from vllm_double.jit import view_part
from vllm_double.retrieval.base import Found

__all__ = ["add_node", "add_run", "begin", "note_found", "pick", "pick_again", "read_texts"]


def begin(arena: Arena, forward: Forward, prefill_tokens: int) -> None:
    """An empty forward, and the texts that wait for it: those with short gaps first, so that a long prompt holds up nobody.

    The draft cannot help if the text has ended, or is as long as it can read or as the request can get.
    """
    progress, waiting = forward.progress[0], forward.picks
    progress.num_runs = progress.num_copies = progress.num_outputs = progress.num_tokens = 0
    progress.num_waiting = progress.num_read = 0
    progress.prefill_budget, progress.is_full, arena.totals[0].is_short = prefill_tokens, False, False
    for slot in range(len(arena.requests)):
        request = arena.requests[slot]
        longest = min(request.max_length, arena.limits[0].max_length)
        if request.is_live and request.num_cached < request.length and request.length < longest and not request.has_ended:
            at, gap = progress.num_waiting, request.length - request.num_cached
            while at > 0 and arena.requests[waiting[at - 1]].length - arena.requests[waiting[at - 1]].num_cached > gap:
                waiting[at] = waiting[at - 1]
                at -= 1
            waiting[at] = slot
            progress.num_waiting += 1


def pick(arena: Arena, forward: Forward, num_nodes: int, min_log_prob: float, min_asked: float) -> int:
    """Pick up to ``num_nodes`` nodes, which have no pages yet; returns how many queries to the sources there are.

    ``min_log_prob``: of a path that is worked on; ``min_asked``: of one that the sources are asked about (0: none is asked).
    """
    progress, num_awaited = forward.progress[0], 0
    for slot in range(len(arena.requests)):
        num_awaited += int(arena.requests[slot].is_live and arena.requests[slot].is_awaited)
    # A target that waits gets its next token soonest from a forward of few nodes.
    progress.budget = min(num_awaited, num_nodes) if num_awaited > 0 else num_nodes
    progress.min_log_prob, progress.num_queries, progress.num_placed, progress.lacking = min_log_prob, 0, 0, 0
    _pick(arena, forward)
    if min_asked < 0.0:
        for run in range(progress.num_runs):
            if forward.runs[run].num_nodes > 0:
                _ask(arena, forward, forward.runs[run].tip, min_asked)
        for index in range(progress.num_picks):
            _ask(arena, forward, forward.picks[index], min_asked)
    return progress.num_queries  # type: ignore[no-any-return]


# ---- texts ----------------------------------------------------------------------------------------------------------


def read_texts(arena: Arena, forward: Forward) -> int:
    """Rows for committed tokens that the draft has not read, within the budget; 1 if ``progress.lacking`` pages are lacking.

    Called again, it goes on with the text that lacks them.
    """
    progress = forward.progress[0]
    while progress.num_read < progress.num_waiting and progress.prefill_budget > 0:
        slot = forward.picks[progress.num_read]
        request = arena.requests[slot]
        start, num_tokens = request.num_cached, min(request.length - request.num_cached, progress.prefill_budget)
        branch = extend(arena, forward, slot, NONE, num_tokens)
        if branch == NONE:
            progress.lacking, arena.totals[0].is_short = num_tokens // arena.limits[0].page_size + 2, True
            return 1
        arena.totals[0].is_short = False
        reads_root = request.root != NONE and start + num_tokens == request.length
        run = add_run(forward, slot, branch, start)
        forward.runs[run].num_text = num_tokens - reads_root
        progress.num_tokens += num_tokens - reads_root
        request.num_cached += num_tokens
        if reads_root:
            add_node(arena, forward, run, branch, request.root)
            arena.nodes[request.root].is_tip = True
            look_ahead(arena, request.root)
        progress.num_read += 1
        progress.prefill_budget -= num_tokens
    return 0


@view_part
def add_run(forward: Forward, slot: int, branch: int, start: int) -> int:
    """A row of the batch without tokens."""
    index = forward.progress[0].num_runs
    run = forward.runs[index]
    run.slot, run.branch, run.start, run.num_text, run.num_nodes = slot, branch, start, 0, 0
    forward.progress[0].num_runs += 1
    return index  # type: ignore[no-any-return]


@view_part
def add_node(arena: Arena, forward: Forward, run: int, branch: int, node: int) -> None:
    """At the end of a row. The node's key and value lie on the branch from the forward on."""
    hold(arena, branch, node)
    arena.nodes[node].run, arena.nodes[node].is_fresh = run, True
    arena.requests[arena.nodes[node].slot].num_expanded += 1
    forward.runs[run].num_nodes += 1
    forward.runs[run].tip = node
    forward.progress[0].num_tokens += 1
    forward.progress[0].num_outputs += 1


# ---- candidates -----------------------------------------------------------------------------------------------------


@view_part
def _pick(arena: Arena, forward: Forward) -> None:
    """Pick the most probable candidates within the budget, and one at least of each request that nothing was read for yet."""
    nodes, requests, progress = arena.nodes, arena.requests, forward.progress[0]
    progress.num_picks, progress.deferred = 0, NONE
    for slot in range(len(requests)):
        if not requests[slot].is_live:
            continue
        is_served = requests[slot].num_expanded > 0
        while not is_served and _best(arena, progress.min_log_prob, slot):
            is_served = _pick_best(arena, forward, slot)
        _score(arena, progress.min_log_prob, slot)
    while progress.num_picks < progress.budget:
        best, score = NONE, -math.inf
        for slot in range(len(requests)):
            if requests[slot].is_live and requests[slot].score > score:
                best, score = slot, requests[slot].score
        if best == NONE:
            break
        if _best(arena, progress.min_log_prob, best):
            _pick_best(arena, forward, best)
        _score(arena, progress.min_log_prob, best)
    while progress.deferred != NONE:
        node = progress.deferred
        progress.deferred = nodes[node].next_beside
        nodes[node].is_picked = False
        push(nodes, requests, node, nodes[node].log_prob)


@view_part
def _best(arena: Arena, min_log_prob: float, slot: int) -> bool:
    """Bring the best candidate that is worth a place in a forward to the head of the heap; False if there is none.

    What lies too deep is no candidate until the next commit.
    """
    nodes, request, limits = arena.nodes, arena.requests[slot], arena.limits[0]
    if request.root == NONE or request.num_cached < request.length:
        return False
    deepest = min(request.length + request.chain_length + limits.num_speculative_tokens, limits.max_length)
    while request.best != NONE:
        node = request.best
        it = nodes[node]
        is_listed = it.branch != NONE
        if is_listed and child_for(nodes, node, arena.listed[node, it.next_listed].token) != NONE:
            remove(nodes, arena.requests, node)
            list_next(arena, node)
            continue
        if it.key - nodes[request.root].log_prob < min_log_prob:
            return False
        if it.position + is_listed < deepest:
            return True
        remove(nodes, arena.requests, node)
    return False


@view_part
def _score(arena: Arena, min_log_prob: float, slot: int) -> None:
    request = arena.requests[slot]
    request.score = -math.inf
    if _best(arena, min_log_prob, slot):
        request.score = arena.nodes[request.best].key - arena.nodes[request.root].log_prob


@view_part
def _pick_best(arena: Arena, forward: Forward, slot: int) -> bool:
    """Pick the request's best candidate; False if that comes too early."""
    nodes, progress = arena.nodes, forward.progress[0]
    node = arena.requests[slot].best
    remove(nodes, arena.requests, node)
    if nodes[node].branch != NONE:
        parent, place = node, nodes[node].next_listed
        log_prob = math.log(max(arena.listed[parent, place].prob, 1e-9))
        node = new_child(arena, parent, arena.listed[parent, place].token, log_prob)
        if node == NONE:
            return False  # no node is free; it is a candidate again with the next commit
        nodes[parent].next_listed = place + 1
        list_next(arena, parent)
    parent = nodes[node].parent
    nodes[node].is_picked = True
    if not nodes[parent].is_tip and (nodes[parent].branch == NONE or nodes[parent].is_fresh):
        nodes[node].next_beside = progress.deferred  # its parent's key and value come with this very forward
        progress.deferred = node
        return False
    nodes[parent].is_tip, nodes[node].is_tip = False, True  # a path that is already given is read in one forward
    forward.picks[progress.num_picks] = node
    progress.num_picks += 1
    look_ahead(arena, node)
    return True


# ---- what is retrieved ----------------------------------------------------------------------------------------------


@view_part
def _ask(arena: Arena, forward: Forward, node: int, min_asked: float) -> None:
    """Ask the sources what follows a likely node, if nothing does yet, and what would is not too deep."""
    it, request, progress = arena.nodes[node], arena.requests[arena.nodes[node].slot], forward.progress[0]
    if it.log_prob - arena.nodes[request.root].log_prob < min_asked or it.first_child != NONE or it.ahead_from < it.ahead_to:
        return
    room = request.length + request.chain_length + arena.limits[0].num_speculative_tokens - it.position - 1
    if room <= 0:
        return
    it.ahead_from = it.ahead_to = 0
    index, length = progress.num_queries, it.position - request.length + 1
    forward.asked[index], forward.queries.keys[index], forward.queries.tail_lengths[index] = node, it.slot, length
    forward.queries.max_tokens[index] = min(room, MAX_AHEAD)
    for place in range(length):
        forward.queries.tails[index, length - 1 - place] = arena.nodes[node].token
        node = arena.nodes[node].parent
    progress.num_queries += 1


def note_found(arena: Arena, forward: Forward, found: Found, min_belief: float) -> None:
    """Note what one source found for each query, as far as it is sure. The longest answer of all sources counts."""
    for index in range(forward.progress[0].num_queries):
        node, num_sure = forward.asked[index], 0
        while (
            num_sure < found.lengths[index]
            and found.beliefs[index, num_sure] >= min_belief
            and found.tokens[index, num_sure] < arena.limits[0].vocab_size
        ):
            num_sure += 1
        if num_sure > arena.nodes[node].ahead_to:
            arena.nodes[node].ahead_from, arena.nodes[node].ahead_to = 0, num_sure
            for place in range(num_sure):
                arena.ahead[node, place].token = found.tokens[index, place]
                arena.ahead[node, place].log_prob = math.log(np.float64(found.beliefs[index, place]))


@view_part
def pick_again(arena: Arena, forward: Forward) -> None:
    """A Retrieval Forward (Double, 2601.05524): what was retrieved behind the picked nodes stands beside them as a candidate.

    So it is read in the same forward. If the draft then says otherwise, its word counts.
    """
    nodes, progress, has_found = arena.nodes, forward.progress[0], False
    for index in range(progress.num_queries):
        has_found |= nodes[forward.asked[index]].ahead_to > 0
    if not has_found:
        return
    for index in range(progress.num_picks):
        node = forward.picks[index]
        nodes[node].is_picked = nodes[node].is_tip = False
        push(nodes, arena.requests, node, nodes[node].log_prob)
    for run in range(progress.num_runs):
        if forward.runs[run].num_nodes > 0:
            nodes[forward.runs[run].tip].is_tip = True
            look_ahead(arena, forward.runs[run].tip)
    _pick(arena, forward)
