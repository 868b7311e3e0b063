"""Speculation tries of all requests in one arena: parts that are compiled into the steps of the round.

``tries`` is a `speculation_trie.Tries`. A node stands for a prefix of a request's text and is named by the prefix's hash. It
holds what the draft listed behind the prefix (a few tokens) and a list of inserted edges, which are retrieved
tokens. Nodes of one request and position form a list, so that a commit drops them together.
"""

from typing import Any

import numpy as np

from vllm_double.jit import as_int, view_part

DRAFT = 0
"""Index of the draft among the sources."""
NONE = -1
MAX_WAYS = 32
"""Edges of a node that are looked at."""
NUM_REFUSED = 8
"""Refused tokens of each bucket of the table; the oldest goes first."""

_RIVALS = 3  # edges of a node that may lie on the best path
_RIVAL_SHARE = 0.3  # of the best edge's probability; a less probable edge is no rival
_ADDEND, _FACTOR = np.uint64(0x632B_E59B_D9B4_E019), np.uint64(0xD6E8_FEB8_6659_FD93)
_DECAY_AT = 4000.0  # trials in a bucket beyond which old ones count half


# ---- calibration ----------------------------------------------------------------------------------------------------


@view_part
def bucket_of(curve: Any, belief: float) -> int:
    """Entry of a calibration curve for a source's own probability; the last one is that of certainty."""
    return min(max(int(belief * (len(curve) - 1)), 0), len(curve) - 1)


@view_part
def learn(calibration: Any, source: int, temperature: int, belief: float, is_right: bool) -> None:
    """Count one example: whether the target continued with the token."""
    curve, hits, trials = calibration
    last = hits.shape[2] - 1
    bucket = min(bucket_of(curve[source, temperature], belief), last)
    tried = trials[source, temperature, bucket] + 1.0
    hit = hits[source, temperature, bucket] + (1.0 if is_right else 0.0)
    if tried > _DECAY_AT:
        tried, hit = tried / 2, hit / 2
    trials[source, temperature, bucket], hits[source, temperature, bucket] = tried, hit
    curve[source, temperature, bucket] = min(max(hit / tried, 1e-4), 0.995)
    if bucket == last:
        curve[source, temperature, last + 1] = curve[source, temperature, bucket]


# ---- stop tokens ----------------------------------------------------------------------------------------------------


@view_part
def is_stop(tries: Any, request: Any, token: int) -> bool:
    """Whether a token ends the request's text."""
    first, last = request.stops_start, request.stops_end
    while first < last:
        middle = (first + last) // 2
        if tries.stops[middle] < token:
            first = middle + 1
        else:
            last = middle
    return first < request.stops_end and tries.stops[first] == token  # type: ignore[no-any-return]


# ---- nodes ----------------------------------------------------------------------------------------------------------


@view_part
def mix(prefix_hash: Any, token: int) -> Any:
    """As `prefix_hash.mix`."""
    h = (prefix_hash ^ (np.uint64(token) + _ADDEND)) * _FACTOR
    return h ^ (h >> np.uint64(32))


@view_part
def _bucket(tries: Any, prefix_hash: Any) -> int:
    return as_int(prefix_hash & np.uint64(len(tries.heads) - 1))


@view_part
def find(tries: Any, slot: int, prefix_hash: Any) -> int:
    """The node of a prefix, or NONE."""
    nodes = tries.nodes
    node = tries.heads[_bucket(tries, prefix_hash)]
    while node != NONE and not (nodes[node].prefix_hash == prefix_hash and nodes[node].owner == slot):
        node = nodes[node].next_in_bucket
    return node  # type: ignore[no-any-return]


@view_part
def make_node(tries: Any, slot: int, prefix_hash: Any, position: int) -> int:
    """The node of a prefix of ``position`` tokens, which is made if there is none. `reserve` came before.

    NONE: the position lies before the root, or further behind it than anything can be verified.
    """
    depth = position - tries.requests[slot].length
    if depth < 0 or depth >= tries.at_position.shape[1]:
        return NONE
    node = find(tries, slot, prefix_hash)
    if node != NONE:
        return node
    pool, nodes = tries.pool[0], tries.nodes
    pool.num_free_nodes -= 1
    node = tries.free_nodes[pool.num_free_nodes]
    new = nodes[node]
    new.prefix_hash, new.owner, new.num_listed, new.first_edge = prefix_hash, slot, 0, NONE
    bucket, place = _bucket(tries, prefix_hash), position & (tries.at_position.shape[1] - 1)
    new.next_in_bucket, tries.heads[bucket] = tries.heads[bucket], node
    new.next_at_position, tries.at_position[slot, place] = tries.at_position[slot, place], node
    return node  # type: ignore[no-any-return]


@view_part
def free_edges(tries: Any, node: int) -> None:
    """Drop what was inserted behind a node."""
    pool, edge = tries.pool[0], tries.nodes[node].first_edge
    while edge != NONE:
        tries.free_edges[pool.num_free_edges] = edge
        pool.num_free_edges += 1
        edge = tries.edges[edge].next
    tries.nodes[node].first_edge = NONE


@view_part
def free_node(tries: Any, node: int) -> None:
    """Take a node out of the table; its position's list is the caller's."""
    nodes, pool = tries.nodes, tries.pool[0]
    bucket = _bucket(tries, nodes[node].prefix_hash)
    before, other = NONE, tries.heads[bucket]
    while other != node:
        before, other = other, nodes[other].next_in_bucket
    if before == NONE:
        tries.heads[bucket] = nodes[node].next_in_bucket
    else:
        nodes[before].next_in_bucket = nodes[node].next_in_bucket
    free_edges(tries, node)
    tries.free_nodes[pool.num_free_nodes] = node
    pool.num_free_nodes += 1


@view_part
def drop_position(tries: Any, slot: int, position: int) -> int:
    """Drop all nodes of a request at a position; returns how many."""
    place, num_dropped = position & (tries.at_position.shape[1] - 1), 0
    node = tries.at_position[slot, place]
    while node != NONE:
        behind = tries.nodes[node].next_at_position
        free_node(tries, node)
        node = behind
        num_dropped += 1
    tries.at_position[slot, place] = NONE
    return num_dropped


@view_part
def drop_all(tries: Any, slot: int) -> None:
    """Drop all nodes of a request."""
    for place in range(tries.at_position.shape[1]):
        drop_position(tries, slot, place)


@view_part
def reserve(tries: Any, num_nodes: int, num_edges: int) -> None:
    """Have so many nodes and edges free. The nodes that lie furthest behind their roots go first: they are used least often."""
    pool = tries.pool[0]
    depth = tries.at_position.shape[1]
    while depth > 0 and (pool.num_free_nodes < num_nodes or pool.num_free_edges < num_edges):
        depth -= 1
        # An eighth at once: the search for them looks at all requests.
        num_nodes, num_edges = max(num_nodes, len(tries.nodes) // 8), max(num_edges, len(tries.edges) // 8)
        for slot in range(len(tries.requests)):
            pool.nodes_evicted += drop_position(tries, slot, tries.requests[slot].length + depth)


# ---- retrieved tokens -----------------------------------------------------------------------------------------------


@view_part
def insert_edge(tries: Any, node: int, token: int, source: int, belief: float, prob: float) -> None:
    """A retrieved token behind a node; what its source said of it before is replaced. `reserve` came before."""
    edges, pool = tries.edges, tries.pool[0]
    last, edge = NONE, tries.nodes[node].first_edge
    while edge != NONE and not (edges[edge].token == token and edges[edge].source == source):
        last, edge = edge, edges[edge].next
    if edge == NONE:
        pool.num_free_edges -= 1
        edge = tries.free_edges[pool.num_free_edges]
        edges[edge].token, edges[edge].source, edges[edge].next = token, source, NONE
        if last == NONE:
            tries.nodes[node].first_edge = edge
        else:
            edges[last].next = edge
    edges[edge].belief, edges[edge].prob = belief, prob


@view_part
def _place_hash(key: Any, tokens: Any, start: int, end: int) -> Any:
    value = key
    for place in range(start, end):
        value = mix(value, tokens[place])
    return value


@view_part
def note_refusal(tries: Any, slot: int, tokens: Any, end: int, token: int, is_wrong: bool) -> None:
    """Remember that the target did not want ``token`` behind ``tokens[:end]``, or that it did after all."""
    request = tries.requests[slot]
    if not (is_wrong or request.has_refusals):
        return
    name = mix(_place_hash(request.key, tokens, max(0, end - tries.limits[0].place_tokens), end), token)
    line = tries.refusals[as_int(name & np.uint64(len(tries.refusals) - 1))]
    place = 0
    while place < NUM_REFUSED - 1 and line[place] != name:
        place += 1
    if is_wrong:  # the newest comes first; the oldest, or the name itself, makes room
        for other in range(place, 0, -1):
            line[other] = line[other - 1]
        line[0] = name
        request.has_refusals = True
    elif line[place] == name:
        line[place] = np.uint64(0)


@view_part
def was_refused(tries: Any, slot: int, tokens: Any, end: int) -> bool:
    """Whether the last token before ``end`` was refused behind those before it."""
    request = tries.requests[slot]
    if not request.has_refusals:
        return False
    name = _place_hash(request.key, tokens, max(0, end - 1 - tries.limits[0].place_tokens), end)
    line = tries.refusals[as_int(name & np.uint64(len(tries.refusals) - 1))]
    place = 0
    while place < NUM_REFUSED and line[place] != name:
        place += 1
    return place < NUM_REFUSED


# ---- the best path --------------------------------------------------------------------------------------------------


@view_part
def _collect_ways(tries: Any, curve: Any, node: int, frame: Any, ways: Any) -> None:
    """Write the tokens behind a node that may lie on the best path into a frame, the most probable first."""
    listed = tries.nodes[node]
    num_ways = 0
    floor = 0.0
    for place in range(listed.num_listed):
        prob = curve[bucket_of(curve, listed.probs[place])]
        if place == 0:
            floor = prob * _RIVAL_SHARE
        elif prob < floor:
            break
        ways[num_ways].token, ways[num_ways].source, ways[num_ways].prob = listed.tokens[place], DRAFT, prob
        num_ways += 1
    edge = listed.first_edge
    has_edges = edge != NONE
    while edge != NONE and num_ways < MAX_WAYS:
        said = tries.edges[edge]
        rival = 0  # if two sources agree on a token, the better probability counts
        while rival < num_ways and ways[rival].token != said.token:
            rival += 1
        if rival == num_ways or said.prob > ways[rival].prob:
            num_ways = max(num_ways, rival + 1)
            ways[rival].token, ways[rival].source, ways[rival].prob = said.token, said.source, said.prob
        edge = said.next
    if has_edges:
        floor = _sort_ways(ways, num_ways) * _RIVAL_SHARE
    frame.node, frame.next, frame.best, frame.num_ways = node, 0, 0.0, 0
    for place in range(min(num_ways, _RIVALS)):
        if ways[place].prob >= floor:
            frame.tokens[frame.num_ways], frame.sources[frame.num_ways] = ways[place].token, ways[place].source
            frame.probs[frame.num_ways] = ways[place].prob
            frame.num_ways += 1
    tries.best[node].prob = 0.0


@view_part
def _sort_ways(ways: Any, num_ways: int) -> float:
    """By falling probability, then by falling token; returns the best probability."""
    for end in range(1, num_ways):
        token, source, prob = ways[end].token, ways[end].source, ways[end].prob
        place = end
        while place > 0 and (ways[place - 1].prob < prob or (ways[place - 1].prob == prob and ways[place - 1].token < token)):
            before = ways[place - 1]
            ways[place].token, ways[place].source, ways[place].prob = before.token, before.source, before.prob
            place -= 1
        ways[place].token, ways[place].source, ways[place].prob = token, source, prob
    return ways[0].prob  # type: ignore[no-any-return]


@view_part
def _weigh(tries: Any, frame: Any, worth: float, child: int) -> None:
    """The frame's next way is worth so many accepted tokens; ``child``: the node that it leads to."""
    if worth > frame.best:
        frame.best = worth
        way = tries.best[frame.node]
        way.token, way.source, way.prob = frame.tokens[frame.next], frame.sources[frame.next], frame.probs[frame.next]
        way.child = child
    frame.next += 1


@view_part
def best_path(
    tries: Any, curve: Any, slot: int, max_tokens: int, floor: float, stack: Any, ways: Any, path: Any
) -> int:  # fmt: skip
    """Write the path from the root with the highest expected number of accepted tokens; returns its length.

    curve: of the draft at the request's temperature. floor: nothing is looked for behind a token that is accepted with no
    higher probability. stack: a frame for each of ``max_tokens``. A depth-first search: a way is not followed if it is worth
    less than the best one even if all that follows is accepted.
    """
    root = find(tries, slot, tries.requests[slot].root_hash)
    if root == NONE or max_tokens <= 0:
        return 0
    _collect_ways(tries, curve, root, stack[0], ways)
    stack[0].accept_prob = 1.0
    depth = 0
    while depth >= 0:
        frame, room = stack[depth], max_tokens - depth
        prob = frame.probs[frame.next] if frame.next < frame.num_ways else 0.0
        if prob * room > frame.best:
            child, accept_prob = NONE, frame.accept_prob * prob
            if room > 1 and accept_prob > floor:
                child = find(tries, slot, mix(tries.nodes[frame.node].prefix_hash, frame.tokens[frame.next]))
            if child == NONE:
                _weigh(tries, frame, prob, NONE)
            else:
                depth += 1
                _collect_ways(tries, curve, child, stack[depth], ways)
                stack[depth].accept_prob = accept_prob
        else:
            depth -= 1
            if depth >= 0:
                above = stack[depth]
                _weigh(tries, above, above.probs[above.next] * (1.0 + frame.best), frame.node)
    return _read_path(tries, root, max_tokens, path)


@view_part
def _read_path(tries: Any, root: int, max_tokens: int, path: Any) -> int:
    node, length, accept_prob = root, 0, 1.0
    while node != NONE and length < max_tokens and tries.best[node].prob > 0.0:
        way = tries.best[node]
        accept_prob *= way.prob
        step = path[length]
        step.token, step.source, step.prob, step.accept_prob = way.token, way.source, way.prob, accept_prob
        node = way.child
        length += 1
    return length
