"""A suffix automaton over tokens that counts occurrences online: compiled functions on the arena's arrays.

Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text": each state is a set of
substrings that end at the same positions, and its suffix link leads to their longest suffix that ends at more
positions. Added to that:

- **Depth.** Lookups use at most ``max_match`` tokens of context, so only substrings of at most
  ``max_match + 1`` tokens (context and next token) are held. A new token extends the state of the last
  ``max_match`` tokens, the window, instead of the state of the whole text, and adds nothing where that was
  seen before. So a path of suffix links has at most ``max_match + 1`` states (a handful in prose), and a
  token costs no more than such a path, save for the transitions that a split copies: O(1) amortised.
- **Counts.** A token adds an occurrence to the states on the path of suffix links from the new end, and to no
  other: ``count``, and ``end`` of the last occurrence, are exact at all times.
- **The most frequent next token of each state**, ``best``. Context + next token occurs as often as the count
  of the state that the transition leads to. Only states on that path gain, so one comparison per state keeps
  it.
- **One transition inside the state**, ``first``; a list of others begins with ``edges``. A state's longest substring (of
  ``length`` tokens, the last being ``token``), with each token that a transition adds, is in the text. Such substrings form
  a trie with at most one leaf per token, so the transitions beyond each state's first number fewer than the tokens. A hash
  table with two slots per token holds them.

Memory per token of capacity, which is at most twice the tokens: 64 bytes of states (two at worst; what is
never written is not resident), 16 of transitions, 8 of table, 4 of text.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_double.jit import view_part
from vllm_double.retrieval.suffix_automaton.arena import NONE, Arrays, Ints, Records

Record = Any
"""One of an array of records; what is written to its fields is written to the array."""

ROOT = 0
# The last token of a document: contexts do not reach across it, and nothing is continued with it.
SEPARATOR = 2**31 - 1


class Index(NamedTuple):
    """The range of one automaton."""

    states: Records
    edges: Records
    table: Ints


@view_part
def _range(arrays: Arrays, start: int, capacity: int) -> Index:
    stop = start + capacity
    return Index(arrays.states[2 * start : 2 * stop], arrays.edges[start:stop], arrays.table[2 * start : 2 * stop])


@view_part
def index_of(arrays: Arrays, automaton: Record) -> Index:
    return _range(arrays, automaton.start, automaton.capacity)


@view_part
def _slot(index: Index, state: int, token: int) -> int:
    """The table slot of a transition, or the empty one where it belongs."""
    edges, table = index.edges, index.table
    mask = table.size - 1
    mixed = np.uint64(state) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(token) * np.uint64(0xD6E8FEB86659FD93)
    slot = np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(mask))
    while True:
        edge = table[slot] - 1
        if edge < 0 or (edges[edge].source == state and edges[edge].label == token):
            return slot  # type: ignore[return-value]
        slot = (slot + 1) & mask


@view_part
def _find(index: Index, state: int, token: int) -> int:
    """The state that ``token`` leads to, or NONE."""
    states = index.states
    first = states[state].first
    if first == NONE or states[first].token == token:
        return first  # type: ignore[no-any-return]
    if states[state].edges == NONE:
        return NONE
    edge = index.table[_slot(index, state, token)] - 1
    return index.edges[edge].target if edge >= 0 else NONE


@view_part
def _connect(automaton: Record, index: Index, state: int, token: int, target: int) -> None:
    """Add a transition, or give the one that is there another target, whose token is set already."""
    states, edges = index.states, index.edges
    first = states[state].first
    if first == NONE or states[first].token == token:
        states[state].first = target
        return
    slot = _slot(index, state, token)
    edge = index.table[slot] - 1
    if edge < 0:
        edge = automaton.num_edges
        automaton.num_edges += 1
        edges[edge].source = state
        edges[edge].label = token
        edges[edge].next = states[state].edges
        states[state].edges = edge
        index.table[slot] = edge + 1
    edges[edge].target = target


@view_part
def _split(automaton: Record, index: Index, parent: int, token: int) -> int:
    """Give the substrings of parent + token a state of their own: they now end where longer ones don't."""
    states, edges = index.states, index.edges
    whole = _find(index, parent, token)
    piece = automaton.num_states
    automaton.num_states += 1
    states[piece] = states[whole]
    states[piece].length = states[parent].length + 1
    states[piece].edges = NONE
    edge = states[whole].edges
    while edge != NONE:
        _connect(automaton, index, piece, edges[edge].label, edges[edge].target)
        edge = edges[edge].next
    while parent != NONE and _find(index, parent, token) == whole:
        _connect(automaton, index, parent, token, piece)
        parent = states[parent].link
    states[whole].link = piece
    return piece  # type: ignore[no-any-return]


@view_part
def clamp(states: Records, state: int, length: int) -> int:
    """The state of the last ``length`` tokens of a substring that ``state`` holds."""
    while state != ROOT and states[states[state].link].length >= length:
        state = states[state].link
    return state


@view_part
def _insert(automaton: Record, index: Index, parent: int, token: int) -> int:
    """States, links and transitions for window + token, which is new; ``parent`` is the window's state."""
    states = index.states
    new = automaton.num_states
    automaton.num_states += 1
    states[new].length = automaton.window_length + 1
    states[new].count = 0
    states[new].best = NONE
    states[new].token = token
    states[new].first = NONE
    states[new].edges = NONE
    found = NONE
    while parent != NONE:
        found = _find(index, parent, token)
        if found != NONE:
            break
        _connect(automaton, index, parent, token, new)
        parent = states[parent].link
    if parent == NONE:
        found = ROOT
    elif states[found].length != states[parent].length + 1:
        found = _split(automaton, index, parent, token)
    states[new].link = found
    return new  # type: ignore[no-any-return]


@view_part
def append(automaton: Record, index: Index, token: int) -> None:
    """One more token, and one more occurrence of all that ends with it. Behind a separator a new document begins."""
    states = index.states
    length, max_match = automaton.window_length, automaton.max_match
    context = automaton.window
    top = _find(index, context, token)
    if top == NONE:
        top = _insert(automaton, index, context, token)
    elif states[top].length > length + 1:
        # Near a document's beginning: what was seen with more before it now occurs without.
        top = _split(automaton, index, context, token)
    automaton.num_tokens += 1
    automaton.window_length = min(length + 1, max_match)
    automaton.window = top if length < max_match else clamp(states, top, max_match)
    followed = top
    while followed != ROOT:
        states[followed].count += 1
        states[followed].end = automaton.num_tokens
        followed = states[followed].link
    # A split of the window's own state leaves its longer part in ``context``: too long for a context, so its
    # best is never read. All that led to a split state gain here, so no best stays with the longer part.
    followed = top
    while context != ROOT:
        followed = clamp(states, followed, length + 1)
        best = states[context].best
        # >= : of equally frequent tokens the one seen last.
        if best == NONE or states[followed].count >= states[best].count:
            states[context].best = followed
        context = states[context].link
        length = states[context].length
    if token == SEPARATOR:
        automaton.window = ROOT
        automaton.window_length = 0


@view_part
def advance(index: Index, state: int, length: int, token: int, max_match: int) -> tuple[int, int]:
    """The longest suffix of (what ``state`` holds with ``length`` tokens) + token that occurs: its state and length."""
    states = index.states
    target = _find(index, state, token)
    while target == NONE and state != ROOT:
        state = states[state].link
        length = states[state].length
        target = _find(index, state, token)
    if target == NONE:
        return state, length
    # What a transition leads to holds each context of its state, and the token: a look at its link is a look far away.
    return (target, length + 1) if length < max_match else (clamp(states, target, max_match), max_match)


@view_part
def occurs(index: Index, text: Ints) -> bool:
    state = ROOT
    for i in range(text.size):
        state = _find(index, state, text[i])
        if state == NONE:
            return False
    return True


@view_part
def followed(states: Records, state: int, length: int) -> tuple[int, int]:
    """The longest suffix that occurs with a token behind it."""
    while state != ROOT and states[state].best == NONE:
        state = states[state].link
        length = states[state].length
    return state, length


@view_part
def note(
    row: int, i: int, token: int, match_length: int, count: int, total: int, doubt: float,
    tokens: Ints, beliefs: npt.NDArray[np.float32], evidence: Records,
) -> float:  # fmt: skip
    """Write down token i of an answer and the evidence for it. Returns the doubt about the next one. See `base.beliefs`."""
    if i == 0:
        doubt = 0.5 ** (match_length / 2)
    tokens[row, i] = token
    beliefs[row, i] = (1.0 - doubt) * count / (total + 0.1)
    if evidence.size:
        evidence[row, i].match_length = match_length
        evidence[row, i].count = count
        evidence[row, i].total = total
    return doubt * math.sqrt(0.5)


@view_part
def continue_context(
    automaton: Record, states: Records, state: int, length: int, row: int, max_tokens: int, tokens: Ints,
    beliefs: npt.NDArray[np.float32], evidence: Records,
) -> int:  # fmt: skip
    """Fill a row of an answer with what follows a context; returns how many tokens."""
    num_tokens, max_match = automaton.num_tokens, automaton.max_match
    match_length, num_found, doubt = length, 0, 1.0
    while num_found < max_tokens:
        state, length = followed(states, state, length)
        if num_found == 0:
            match_length = length
        if state == ROOT or length < match_length:
            break
        best = states[state].best
        if states[best].token == SEPARATOR:
            break
        # The occurrence at the very end of the text has no token behind it.
        total = states[state].count - (states[state].end == num_tokens)
        doubt = note(
            row, num_found, states[best].token, match_length, states[best].count, total, doubt, tokens, beliefs, evidence
        )
        num_found += 1
        if length < max_match:
            state, length = best, length + 1
        else:
            state = clamp(states, best, max_match)
    return num_found


@view_part
def text_at(arrays: Arrays, automaton: Record, position: int) -> int:
    """A token of an automaton's text, of which the part beyond its range lies in the one that it is moving to."""
    start = automaton.start if position < automaton.capacity else automaton.grown_start
    return arrays.text[start + position]  # type: ignore[no-any-return]


@view_part
def append_text(arrays: Arrays, automaton: Record, tokens: Ints) -> None:
    """There must be room."""
    for i in range(tokens.size):
        position = automaton.length + i
        if position < automaton.capacity:
            arrays.text[automaton.start + position] = tokens[i]
        if automaton.grown_capacity:  # the move may be past it
            arrays.text[automaton.grown_start + position] = tokens[i]
    automaton.length += tokens.size


@view_part
def has_room(automaton: Record, num_tokens: int) -> bool:
    """Whether so many tokens fit behind the text."""
    return automaton.length + num_tokens <= max(automaton.capacity, automaton.grown_capacity)  # type: ignore[no-any-return]


@view_part
def move(arrays: Arrays, automaton: Record, num_tokens: int) -> None:
    """Copy the share of at most so many tokens to the larger range; the last of them makes it the automaton's own.

    Then ``grown_start`` and ``grown_capacity`` are those of the old range, and ``num_moved`` is NONE.
    """
    old, new = index_of(arrays, automaton), _range(arrays, automaton.grown_start, automaton.grown_capacity)
    stop = min(automaton.num_moved + num_tokens, automaton.capacity)
    for i in range(automaton.num_moved, stop):
        arrays.text[automaton.grown_start + i] = arrays.text[automaton.start + i]
        if i < automaton.num_edges:
            new.edges[i] = old.edges[i]
            new.table[_slot(new, old.edges[i].source, old.edges[i].label)] = i + 1
    for i in range(2 * automaton.num_moved, min(2 * stop, automaton.num_states)):
        new.states[i] = old.states[i]
    automaton.num_moved = stop
    if stop == automaton.capacity:
        start, capacity = automaton.start, automaton.capacity
        automaton.start, automaton.capacity = automaton.grown_start, automaton.grown_capacity
        automaton.grown_start, automaton.grown_capacity = start, capacity
        automaton.num_moved = NONE


@view_part
def unknown_row(requests: Records, keys: Ints) -> int:
    """The first row whose key has no request, or NONE."""
    for row in range(keys.size):
        if not 0 <= keys[row] < requests.size or not requests[keys[row]].live:
            return row
    return NONE


@view_part
def unready_row(arrays: Arrays, requests: Records, keys: Ints, starts: Ints, num_spare: int) -> int:
    """The first row whose text, an automaton's unless ``slot`` is NONE, has no room for the row's tokens and some to spare, or
    -2 - row if its key is unknown; NONE: there is none."""
    unknown = unknown_row(requests, keys)
    if unknown != NONE:
        return -2 - unknown
    for row in range(keys.size):
        slot = requests[keys[row]].slot
        if slot != NONE and not has_room(arrays.automata[slot], starts[row + 1] - starts[row] + num_spare):
            return row
    return NONE


def crowded(arrays: Arrays, requests: Records, first: int, num_spare: int) -> int:
    """The first key from ``first`` on whose text will soon have no room for so many tokens more, or NONE."""
    for key in range(first, requests.size):
        if requests[key].live and requests[key].slot != NONE and not has_room(arrays.automata[requests[key].slot], num_spare):
            return key
    return NONE
