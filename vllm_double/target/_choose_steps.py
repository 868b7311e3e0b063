"""The chains of a round: what the sources found is inserted, the best paths are searched, and cut where they stop to pay.

``tries``: `speculation_trie.Tries`; ``tables``: `calibration.Tables`; ``search``: `speculation_trie.Search`; ``rows``:
`batch.Rows`; ``live``: `batch.Live`.
"""

from typing import Any

from vllm_double.jit import as_int, view_part
from vllm_double.target._trie_steps import (
    DRAFT,
    NONE,
    best_path,
    bucket_of,
    insert_edge,
    is_stop,
    make_node,
    mix,
    reserve,
    was_refused,
)

_MIN_ACCEPT_PROB = 0.01  # a retrieved path is taken no further than this


@view_part
def _price(tries: Any, curve: Any, slot: int, recent: Any, num_recent: int, tokens: Any, num_tokens: int, beliefs: Any,
           accept_prob: float, floor: float, source: int, path: Any) -> int:  # fmt: skip
    """Write retrieved tokens with their calibrated probabilities, as far as they are worth a place in the trie.

    recent: the text's end, behind which the tokens are written; accept_prob: of what they come behind.
    """
    for place in range(num_tokens):
        if place > 0 and accept_prob <= floor:
            return place
        said = curve[source, tries.requests[slot].temperature]
        prob = said[bucket_of(said, beliefs[place])]
        accept_prob *= prob
        recent[num_recent + place] = tokens[place]
        if accept_prob < _MIN_ACCEPT_PROB or tokens[place] >= tries.limits[0].vocab_size:
            return place
        if was_refused(tries, slot, recent, num_recent + place + 1):
            return place
        step = path[place]
        step.token, step.source, step.prob, step.accept_prob = tokens[place], source, prob, accept_prob
    return num_tokens


@view_part
def _insert(tries: Any, slot: int, prefix_hash: Any, position: int, path: Any, length: int, beliefs: Any) -> None:
    """A retrieved path becomes edges behind a prefix."""
    reserve(tries, length, length)
    for place in range(length):
        step = path[place]
        node = make_node(tries, slot, prefix_hash, position + place)
        if node == NONE:
            return
        insert_edge(tries, node, step.token, step.source, beliefs[place], step.prob)
        prefix_hash = mix(prefix_hash, step.token)


@view_part
def _copy_end(rows: Any, row: int, num_tokens: int, recent: Any) -> int:
    """The last tokens of a row's text; returns how many."""
    text, end = rows.texts[rows.places[row]], rows.lengths[row]
    start = max(0, end - num_tokens)
    for place in range(start, end):
        recent[place - start] = text[place]
    return end - start  # type: ignore[no-any-return]


def ask(live: Any, picked: Any) -> None:
    """What to ask of the sources about the picked live rows: what follows their texts."""
    for index in range(len(picked)):
        one = picked[index]
        live.keys[index], live.tail_lengths[index], live.tail_limits[index] = live.slots[one], 0, live.limits[one]


def find_paths(
    tries: Any, tables: Any, search: Any, rows: Any, live: Any, picked: Any, floor: float, found: Any, sources: Any
) -> None:  # fmt: skip
    """The best paths of the picked live rows, with what was found behind their texts inserted; and what to ask for behind them.

    floor: see `verify_length.least_threshold`. found: Founds [sources, picked]; sources: their indices. Written:
    ``live.paths``, ``path_lengths``; for those paths that may go on ``tails``, ``tail_lengths`` and ``tail_limits`` (0: nothing
    is to be asked), in the order of ``picked``.
    """
    num_place = tries.limits[0].place_tokens
    for index in range(len(picked)):
        one = picked[index]
        slot, limit = live.slots[one], as_int(live.limits[one])
        request = tries.requests[slot]
        num_recent = _copy_end(rows, live.rows[one], num_place, search.recent) if len(sources) and request.has_refusals else 0
        for place in range(len(sources) if limit > 0 else 0):
            beliefs = found.beliefs[place, index]
            length = _price(tries, tables.curve, slot, search.recent, num_recent, found.tokens[place, index],
                            min(found.lengths[place, index], limit), beliefs, 1.0, floor, sources[place],
                            search.path)  # fmt: skip
            _insert(tries, slot, request.root_hash, request.length, search.path, length, beliefs)
        path = live.paths[one]
        length = best_path(tries, tables.curve[DRAFT, request.temperature], slot, limit, floor, search.stack, search.ways,
                           path)  # fmt: skip
        if length == 0:
            request.missed = True
        live.path_lengths[one] = length
        live.tail_lengths[index] = length
        live.tail_limits[index] = limit - length if length > 0 and path[length - 1].accept_prob > floor else 0
        for place in range(length):
            live.tails[index, place] = path[place].token


def extend_paths(
    tries: Any, tables: Any, search: Any, rows: Any, live: Any, picked: Any, floor: float, found: Any, sources: Any
) -> None:  # fmt: skip
    """Behind the end of a path, where the trie knows nothing, the best of what was found is the way on.

    A path ends with a stop token.
    """
    num_place = tries.limits[0].place_tokens
    for index in range(len(picked)):
        one = picked[index]
        slot, num_tail = live.slots[one], as_int(live.path_lengths[one])
        request, path = tries.requests[slot], live.paths[one]
        best, best_gain, best_length = NONE, 0.0, 0
        num_recent = 0
        if live.tail_limits[index] > 0 and len(sources):
            if request.has_refusals:
                num_recent = _copy_end(rows, live.rows[one], num_place, search.recent)
            for place in range(num_tail):
                search.recent[num_recent + place] = path[place].token
            num_recent += num_tail
            for place in range(len(sources)):
                length = _price(tries, tables.curve, slot, search.recent, num_recent, found.tokens[place, index],
                                min(found.lengths[place, index], live.tail_limits[index]), found.beliefs[place, index],
                                path[num_tail - 1].accept_prob, floor, sources[place], search.path)  # fmt: skip
                gain, accept_prob = 0.0, 1.0
                for step in range(length):
                    accept_prob *= search.path[step].prob
                    gain += accept_prob
                if gain > best_gain:
                    best, best_gain, best_length = place, gain, length
                    for step in range(length):
                        path[num_tail + step] = search.path[step]
        if best != NONE:
            prefix_hash = request.root_hash
            for place in range(num_tail):
                prefix_hash = mix(prefix_hash, path[place].token)
            _insert(tries, slot, prefix_hash, request.length + num_tail, path[num_tail:], best_length,
                    found.beliefs[best, index])  # fmt: skip
            live.path_lengths[one] = num_tail + best_length
        for place in range(live.path_lengths[one]):
            if is_stop(tries, request, path[place].token):
                live.path_lengths[one] = place + 1
                break


def cut_chains(tries: Any, tally: Any, live: Any, chosen: Any, fixed: float, per_token: float) -> None:
    """The chains of the chosen live rows: their paths as far as they pay beside those of all. See `StepCost.estimate`."""
    counts = tally.counts[0]
    threshold = pay_threshold(live.paths, live.path_lengths, live.summary[0], fixed, per_token)
    for index in range(len(chosen)):
        one = chosen[index]
        slot, length = live.slots[one], 0
        while length < live.path_lengths[one] and live.paths[one, length].accept_prob > threshold:
            tries.chains[slot, length] = live.paths[one, length]
            counts.expected_tokens += live.paths[one, length].accept_prob
            length += 1
        tries.requests[slot].chain_length = length
        counts.proposed_tokens += length


@view_part
def pay_threshold(paths: Any, path_lengths: Any, num_rows: int, fixed: float, per_token: float) -> float:
    """Verify the tokens that are accepted with a higher probability than this: the tokens that the batch decodes while one more
    is verified, when it decodes as fast as it can. Dinkelbach 1967: what tokens above one threshold give is the next one.
    """
    threshold = 0.0
    while True:
        expected, seconds = float(num_rows), fixed + per_token * num_rows
        for row in range(num_rows):
            for place in range(path_lengths[row]):
                accept_prob = paths[row, place].accept_prob
                if accept_prob > threshold:
                    expected += accept_prob
                    seconds += per_token
        price = per_token * expected / seconds
        if price <= threshold:
            return threshold
        threshold = price
