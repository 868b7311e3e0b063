"""From picked nodes to the rows of a forward, and from its answer to the trees."""

import math

from vllm_double.draft.arena import NONE, Arena, Floats, Forward, Ints, Records, integer
from vllm_double.draft.branches import extend, own_page
from vllm_double.draft.candidates import push, remove
from vllm_double.draft.choice import add_node, add_run, pick_again
from vllm_double.draft.drawn import list_chances
from vllm_double.draft.request_tree import following, list_next, may_go_on
from vllm_double.jit import view_part
from vllm_double.transport.messages import MAX_CHILDREN

__all__ = ["expand", "place"]

_ONE = integer(1)


def place(arena: Arena, forward: Forward) -> int:
    """Give the picked nodes, and what was retrieved behind them, pages and a place in the batch.

    1 if ``progress.lacking`` pages are lacking for a path with the log-probability ``progress.bound``: called again, it goes on
    with that path.
    """
    nodes, requests, progress = arena.nodes, arena.requests, forward.progress[0]
    if progress.num_placed == 0 and progress.lacking == 0:
        pick_again(arena, forward)
        for run in range(progress.num_runs):
            if forward.runs[run].num_nodes > 0:
                nodes[forward.runs[run].tip].is_tip = False
    while progress.num_placed < progress.num_picks:
        node = forward.picks[progress.num_placed]
        parent, slot = nodes[node].parent, nodes[node].slot
        run, branch = nodes[parent].run, NONE
        if run != NONE or (nodes[parent].branch != NONE and not nodes[parent].is_fresh):  # or the parent got no page
            branch = extend(arena, forward, slot, parent, _ONE)
            if branch == NONE and not progress.is_full and progress.lacking == 0:
                progress.lacking, progress.bound = 2, nodes[node].log_prob - nodes[requests[slot].root].log_prob
                return 1
        progress.lacking = 0
        progress.num_placed += 1
        nodes[node].is_tip = nodes[node].is_picked = False
        if branch == NONE:
            arena.totals[0].is_short |= requests[slot].num_expanded == 0
            push(nodes, requests, node, nodes[node].log_prob)
            continue
        if run == NONE:
            run = add_run(forward, slot, branch, nodes[node].position)
        else:
            nodes[parent].run = NONE
            forward.runs[run].branch = branch
        add_node(arena, forward, run, branch, node)
    _lay_out(arena, forward)
    return 0


@view_part
def _lay_out(arena: Arena, forward: Forward) -> None:
    """Fill the batch's arrays."""
    nodes, branches, token_ids, progress = arena.nodes, arena.branches, forward.token_ids, forward.progress[0]
    starts, num_outputs, query_start = forward.layout[0], forward.layout[1], forward.layout[2]
    end, output = 0, 0
    query_start[0] = 0
    for row in range(progress.num_runs):
        run, text, trunk = forward.runs[row], arena.texts[forward.runs[row].slot], arena.trunks[forward.runs[row].slot]
        starts[row], num_outputs[row] = run.start, run.num_nodes
        for index in range(run.num_text):
            token_ids[end + index] = text[run.start + index]
        end, output = end + run.num_text + run.num_nodes, output + run.num_nodes
        node = run.tip
        for index in range(run.num_nodes):
            token_ids[end - 1 - index] = nodes[node].token
            forward.outputs[output - 1 - index] = node
            node = nodes[node].parent
        query_start[row + 1] = end
        first, table = branches[run.branch].first, forward.tables[row]
        for index in range(first):
            table[index] = trunk[index]
        for index in range(branches[run.branch].num_pages):
            table[first + index] = own_page(arena, run.branch, index)


def expand(arena: Arena, forward: Forward, tokens: Ints, probs: Floats, draws: Records, records: Records) -> int:
    """Note what the draft says behind the forward's nodes: [outputs, children], best first. Fills NODE_DTYPE records.

    Of a retrieved child the draft knows better. draws: DRAW by slot. Returns how many of ``forward.filled`` are set: slots
    whose trunk has new full pages.
    """
    nodes, listed, progress = arena.nodes, arena.listed, forward.progress[0]
    num_listed = tokens.shape[1]
    num_sent = min(num_listed, MAX_CHILDREN)
    for output in range(progress.num_outputs):
        node = forward.outputs[output]
        it, request, record = nodes[node], arena.requests[nodes[node].slot], records[output]
        if it.is_retrieved:
            arena.totals[0].retrieved_tokens += 1
            arena.totals[0].confirmed_tokens += listed[it.parent, 0].token == it.token
        it.run, it.is_fresh, it.num_listed, it.next_listed = NONE, False, num_listed, 0
        for place in range(num_listed):
            entry, prob = listed[node, place], probs[output, place]
            entry.token, entry.prob = tokens[output, place], max(0.0, prob)  # a draft that overflows says NaN
        if request.is_sampled:
            list_chances(draws, it.slot, it.position, tokens[output], listed[node, :num_listed])
        _correct_retrieved(arena, node)
        list_next(arena, node)
        record.handle, record.prefix_hash, record.position, record.count = request.handle, it.hash, it.position + 1, num_sent
        for place in range(num_sent):
            record.tokens[place], record.probs[place] = listed[node, place].token, listed[node, place].prob
    num_filled = 0
    for row in range(progress.num_runs):
        request = arena.requests[forward.runs[row].slot]
        if (request.num_inserted + 1) * arena.limits[0].page_size <= request.num_cached:
            forward.filled[num_filled] = forward.runs[row].slot
            num_filled += 1
    return num_filled


@view_part
def _correct_retrieved(arena: Arena, node: int) -> None:
    """Give a computed node's retrieved children the draft's own log-probability; one that it does not list is least likely."""
    nodes, listed, num_listed = arena.nodes, arena.listed, arena.nodes[node].num_listed
    child, unlisted = nodes[node].first_child, 1.0
    if child != NONE:
        for place in range(num_listed):
            unlisted -= listed[node, place].prob
    while child != NONE:
        if nodes[child].is_retrieved:
            prob = min(listed[node, num_listed - 1].prob, unlisted)
            for place in range(num_listed):
                if listed[node, place].token == nodes[child].token:
                    prob = listed[node, place].prob
            difference = nodes[node].log_prob + math.log(max(prob, 1e-9)) - nodes[child].log_prob
            if nodes[child].branch == NONE:
                _shift(arena, child, difference)
            else:
                nodes[child].log_prob += difference
        child = nodes[child].next_sibling


@view_part
def _shift(arena: Arena, top: int, difference: float) -> None:
    """Change the log-probability of a node that is not computed, and of all behind it."""
    nodes, node = arena.nodes, top
    while node != NONE:
        nodes[node].log_prob += difference
        if nodes[node].is_candidate:
            remove(nodes, arena.requests, node)
        if may_go_on(arena, node):
            push(nodes, arena.requests, node, nodes[node].log_prob)
        node = following(nodes, node, top)
