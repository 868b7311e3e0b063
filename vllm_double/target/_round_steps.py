"""What the target's forward gave, and what the worker has drafted: compiled calls for the whole batch.

``tries``: `speculation_trie.Tries`; ``tables``: `calibration.Tables`; ``tally``: `stats.Tally`; ``means``: `means.Means`;
``rows``: `batch.Rows`; ``live``: `batch.Live`.
"""

from typing import Any

import numpy as np

from vllm_double.jit import as_int, view_part
from vllm_double.retrieval.bundle import extend
from vllm_double.target._trie_steps import (
    DRAFT,
    NONE,
    drop_all,
    drop_position,
    find,
    free_edges,
    free_node,
    is_stop,
    learn,
    make_node,
    mix,
    note_refusal,
    reserve,
)

SLOT_BITS = 20
"""The low bits of a handle are the slot of its request."""
NO_ROOM = -2
DECAY = 0.98
"""Of a mean."""
_RATE_WEIGHT = 0.02  # of a row's forward in the mean of tokens per forward; the first ones count more
_HEADER_WORDS = 6  # 32-bit words of a commit before its arrays: see `messages`


# ---- drain ----------------------------------------------------------------------------------------------------------


def file_nodes(tries: Any, tally: Any, nodes: Any) -> None:
    """Take in what the worker has drafted: nodes (NODE_DTYPE [n]). What lies before its root is late, and dropped."""
    counts = tally.counts[0]
    for index in range(len(nodes)):
        said = nodes[index]
        slot = as_int(said.handle & np.uint64((1 << SLOT_BITS) - 1))
        if slot >= len(tries.requests):
            counts.late_nodes += 1
            continue
        request = tries.requests[slot]
        is_known = request.session != 0 and request.handle == said.handle
        if is_known:
            request.has_drafted = request.pause == 0
        if not is_known or said.position < request.length:
            counts.late_nodes += 1
        elif said.count > 0 and request.use_drafts and not request.finished:
            if tries.pool[0].num_free_nodes == 0:
                reserve(tries, 1, 0)
            node = make_node(tries, slot, said.prefix_hash, as_int(said.position))
            if node != NONE:
                listed = tries.nodes[node]
                num_said, place = min(as_int(said.count), len(listed.tokens)), 0
                while place < num_said and 0 <= said.tokens[place] < tries.limits[0].vocab_size:
                    listed.tokens[place], listed.probs[place] = said.tokens[place], said.probs[place]
                    place += 1
                listed.num_listed = place


# ---- commit ---------------------------------------------------------------------------------------------------------


@view_part
def observe(means: Any, index: int, value: float) -> None:
    """One more value of a decaying mean."""
    means[index].total = means[index].total * DECAY + value
    means[index].weight = means[index].weight * DECAY + 1.0


@view_part
def observe_use(request: Any, limits: Any, num_committed: int, num_accepted: int) -> bool:
    """So many tokens were committed, ``num_accepted`` of them from the draft; True if the draft pauses from now on.

    If retrieval brings all that is accepted, the draft only takes memory bandwidth from a target beside it, and time from
    other requests: it pauses, and is tried again.
    """
    if request.pause > 0:
        request.pause -= min(num_committed, request.pause)
        return False
    request.num_committed += num_committed
    request.num_accepted += num_accepted
    if request.num_committed < limits.trial_tokens:
        return False
    is_of_use = request.num_accepted >= limits.least_share * request.num_committed
    request.num_committed = request.num_accepted = 0
    if is_of_use:
        request.next_pause = limits.first_pause
        return False
    request.pause = request.next_pause
    request.next_pause = min(2 * request.next_pause, limits.longest_pause)
    return True


@view_part
def _num_counting(tries: Any, request: Any, text: Any, known: int, num_sampled: int) -> int:
    """Sampled tokens can run past the end of the text: only the scheduler trims them. Here that end is found."""
    if request.finished:
        return 0
    for place in range(num_sampled):
        if is_stop(tries, request, text[known + place]) or known + place + 1 >= request.max_length:
            request.finished = True
            return place + 1
    return num_sampled


@view_part
def _count_verified(tries: Any, tally: Any, slot: int, verified: Any, num_accepted: int) -> None:
    """The scheduler may cut a chain, or schedule tokens that nobody proposed."""
    chain = tries.chains[slot]
    for place in range(min(len(verified), tries.requests[slot].chain_length)):
        if chain[place].token != verified[place]:
            break
        tally.offered[chain[place].source] += 1
        if place < num_accepted:
            tally.accepted[chain[place].source] += 1


@view_part
def _judge_draft(tries: Any, slot: int, session: Any, num_verified: int, num_new: int, num_accepted: int) -> bool:
    """The draft is judged by what was verified while it was there to draft; True if it pauses from now on.

    While it pauses the worker is sent nothing, and has soon no work left; then it is sent all that it missed.
    """
    request = tries.requests[slot]
    is_known = request.session != 0 and request.session == session
    if request.pause == 0 and not (num_verified > 0 and request.has_drafted and is_known):
        return False
    num_drafted = 0
    for place in range(min(num_accepted, request.chain_length)):
        num_drafted += tries.chains[slot, place].source == DRAFT
    pauses = observe_use(request, tries.limits[0], num_new, num_drafted)
    if pauses:
        request.has_drafted = False
    return pauses  # type: ignore[no-any-return]


@view_part
def _walk(tries: Any, tables: Any, counts: Any, means: Any, slot: int, text: Any, known: int, num_new: int) -> None:
    """Move the root by the new tokens; every token that was said about them is an example for the calibration."""
    request = tries.requests[slot]
    temperature = request.temperature
    for place in range(known, known + num_new):
        token = text[place]
        node = find(tries, slot, request.root_hash)
        if node != NONE:
            listed = tries.nodes[node]
            if listed.num_listed > 0:
                is_right = listed.tokens[0] == token
                counts.draft_first_examples += 1
                counts.draft_first_accepted += is_right
                observe(means.accepted, temperature, 1.0 if is_right else 0.0)
                if request.missed and place == known:
                    observe(means.accepted_after_miss, temperature, 1.0 if is_right else 0.0)
            for child in range(listed.num_listed):
                is_right = listed.tokens[child] == token
                learn(tables, DRAFT, temperature, listed.probs[child], is_right)
                counts.draft_listed_accepted += is_right
            edge = listed.first_edge
            while edge != NONE:
                said = tries.edges[edge]
                learn(tables, said.source, temperature, said.belief, said.token == token)
                if said.token != token and temperature == 0:  # elsewhere the noise says which tokens are drawn
                    note_refusal(tries, slot, text, place, said.token, True)
                edge = said.next
        if temperature == 0:
            note_refusal(tries, slot, text, place, token, False)
        drop_position(tries, slot, place)
        request.root_hash = mix(request.root_hash, token)
        request.length = place + 1


def commit(
    tries: Any, tables: Any, tally: Any, means: Any, rows: Any, live: Any, session: Any, indexes: Any
) -> int:  # fmt: skip
    """Take in what was sampled, and let the sources of the bundle know.

    Returns NONE, or why nothing was done: NO_ROOM in ``live``, or the first row whose text is not what was committed last.

    Rows of unknown requests have slot NONE. Written into ``live``: the ``summary``; of the rows that want drafts ``rows``,
    ``slots`` and ``limits`` (of their chains); of the texts that went on ``grown_slots`` and, flat, ``new_tokens`` with
    ``new_starts``; of those that ended ``ended``, ``ended_slots`` and, by row of the batch, ``ends``.
    """
    status = _unready(tries, rows, live)
    if status != NONE:
        return status
    counts = tally.counts[0]
    num_live = num_sampled_rows = num_grown = num_ended = num_tokens = 0
    live.new_starts[0] = 0
    for row in range(len(rows.slots)):
        slot, num_sampled = rows.slots[row], as_int(rows.num_sampled[row])
        if slot == NONE or num_sampled == 0:
            continue
        request, text = tries.requests[slot], rows.texts[rows.places[row]]
        verified = rows.verified[rows.verified_starts[row] : rows.verified_starts[row + 1]]
        known = rows.lengths[row] - num_sampled
        num_new = _num_counting(tries, request, text, known, num_sampled)
        num_accepted = min(num_new, num_sampled - 1)
        counts.rows += 1
        counts.committed_tokens += num_new
        counts.rows_without_drafts += len(verified) == 0
        _count_verified(tries, tally, slot, verified, num_accepted)
        batch = means.batch[0]
        batch.num_rows += 1
        weight = max(_RATE_WEIGHT, 1.0 / (1.0 + batch.num_rows))
        batch.tokens_per_row += weight * (num_new - batch.tokens_per_row)
        batch.chain_length += weight * (len(verified) - batch.chain_length)
        counts.draft_pauses += _judge_draft(tries, slot, session, len(verified), num_new, num_accepted)
        request.chain_length = 0
        if not request.use_drafts:
            request.length = known + num_sampled
            continue
        live.grown_slots[num_grown] = slot
        for place in range(num_new):
            live.new_tokens[num_tokens + place] = text[known + place]
        num_tokens += num_new
        num_grown += 1
        live.new_starts[num_grown] = num_tokens
        if request.finished:
            drop_all(tries, slot)
            request.length = known + num_sampled
            if num_new > 0:
                live.ended[num_ended], live.ended_slots[num_ended], live.ends[row] = row, slot, known + num_new
                num_ended += 1
            continue
        _walk(tries, tables, counts, means, slot, text, known, num_new)
        is_hit = find(tries, slot, request.root_hash) != NONE
        counts.lookups += 1
        counts.hits += is_hit
        _observe_forward(means, request, len(verified), num_new, is_hit)
        live.rows[num_live], live.slots[num_live] = row, slot
        live.limits[num_live] = min(tries.chains.shape[1], max(request.max_length - request.length - 1, 0))
        num_live += 1
        num_sampled_rows += request.temperature > 0
    counts.nodes_evicted += tries.pool[0].nodes_evicted
    tries.pool[0].nodes_evicted = 0
    num_told = extend(indexes, live.grown_slots[:num_grown], live.new_tokens, live.new_starts[: num_grown + 1])
    summary = live.summary
    summary[0], summary[1], summary[2], summary[3], summary[4] = num_live, num_sampled_rows, num_grown, num_ended, num_told
    return NONE


@view_part
def _unready(tries: Any, rows: Any, live: Any) -> int:
    """See `commit`."""
    num_sampled = 0
    for row in range(len(rows.slots)):
        slot, known = rows.slots[row], rows.lengths[row] - rows.num_sampled[row]
        num_sampled += rows.num_sampled[row]
        if slot != NONE and rows.num_sampled[row] > 0 and known != tries.requests[slot].length:
            return row
    return NO_ROOM if num_sampled > len(live.new_tokens) or len(rows.slots) > len(live.grown_slots) else NONE


@view_part
def _observe_forward(means: Any, request: Any, num_verified: int, num_new: int, is_hit: bool) -> None:
    """A row's forward: what it gave, and whether its outcome was prepared."""
    if not request.missed:
        observe(means.tokens_of_hit, 0, float(num_new))
    hit = 1.0 if is_hit else 0.0
    if request.waited:
        observe(means.hits_after_wait, 0, hit)
    elif num_verified > 0:
        observe(means.hits_after_chain, 0, hit)
    else:
        observe(means.hits_after_nothing, 0, hit)
    request.missed = request.waited = False


# ---- send -----------------------------------------------------------------------------------------------------------


def pack_commits(
    tries: Any, rows: Any, which: Any, slots: Any, ends: Any, session: Any, waits: bool, most: int, longest: int, words: Any,
    floats: Any, unknown: Any,
) -> tuple[int, int, int]:  # fmt: skip
    """Write a commit for each of the rows ``which`` up to ``ends`` (by row of the batch), as `messages` has it, into ``words``.

    A paused request is sent nothing but its end. floats: the same memory as ``words``. most: tokens of one command. longest: of
    a text that the worker can use, plus one. Returns how many rows were looked at before the room ended, how many words were
    written, and how many rows are ``unknown``: the worker must admit their requests first.
    """
    size = num_unknown = 0
    for index in range(len(which)):
        row, slot = which[index], slots[index]
        request = tries.requests[slot]
        if not request.use_worker or (request.pause > 0 and not request.finished):
            continue
        num_tokens, num_chain = ends[row] - as_int(request.num_sent), as_int(request.chain_length)
        if request.session == 0 or request.session != session or num_tokens > most or ends[row] >= longest:
            unknown[num_unknown] = index
            num_unknown += 1
            continue
        if size + _HEADER_WORDS + num_tokens + 2 * num_chain > len(words):
            return index, size, num_unknown
        text = rows.texts[rows.places[row]]
        words[size] = np.uint32(request.handle & np.uint64(0xFFFF_FFFF))
        words[size + 1] = np.uint32(request.handle >> np.uint64(32))
        words[size + 2], words[size + 3], words[size + 4] = request.num_sent, num_tokens, num_chain
        words[size + 5] = 1 if waits else 0
        size += _HEADER_WORDS
        for place in range(num_tokens):
            words[size + place] = np.uint32(text[request.num_sent + place])
        size += num_tokens
        for place in range(num_chain):
            words[size + place] = np.uint32(tries.chains[slot, place].token)
            floats[size + num_chain + place] = tries.chains[slot, place].prob
        size += 2 * num_chain
        request.num_sent = ends[row]
    return len(which), size, num_unknown


def forget_retrieved(tries: Any) -> None:
    """Drop everything that was retrieved; what the draft said stays. A node of which nothing is left goes, too."""
    nodes = tries.nodes
    for slot in range(len(tries.requests)):
        for place in range(tries.at_position.shape[1]):
            kept = NONE
            node = tries.at_position[slot, place]
            while node != NONE:
                behind = nodes[node].next_at_position
                if nodes[node].num_listed > 0:
                    free_edges(tries, node)
                    nodes[node].next_at_position, kept = kept, node
                else:
                    free_node(tries, node)
                node = behind
            tries.at_position[slot, place] = kept


def drop_request(tries: Any, slot: int) -> None:
    """Drop all nodes of a request."""
    drop_all(tries, slot)
