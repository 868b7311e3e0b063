"""Each request's candidates for the next forward: nodes in a pairing heap, the most probable first.

A node that is not computed stands for itself, a computed one for the best token of its list that is no node yet. The links of
the heap are fields of the nodes: ``first_below`` leads down, ``next_beside`` aside, ``before`` back to whence a node is linked.
"""

from vllm_double.draft.arena import NONE, Records
from vllm_double.jit import view_part

__all__ = ["push", "remove"]


@view_part
def push(nodes: Records, requests: Records, node: int, key: float) -> None:
    """Make a node a candidate, which it is not yet."""
    nodes[node].key = key
    nodes[node].is_candidate = True
    nodes[node].first_below = nodes[node].next_beside = nodes[node].before = NONE
    request = requests[nodes[node].slot]
    request.best = _meld(nodes, request.best, node)


@view_part
def remove(nodes: Records, requests: Records, node: int) -> None:
    """Make a node a candidate no more."""
    nodes[node].is_candidate = False
    below = _meld_below(nodes, node)
    before, beside = nodes[node].before, nodes[node].next_beside
    request = requests[nodes[node].slot]
    if before == NONE:
        request.best = below
        return
    if nodes[before].first_below == node:
        nodes[before].first_below = beside
    else:
        nodes[before].next_beside = beside
    if beside != NONE:
        nodes[beside].before = before
    request.best = _meld(nodes, request.best, below)


@view_part
def _is_better(nodes: Records, one: int, other: int) -> bool:
    """Of equally probable nodes a parent comes before its children."""
    if nodes[one].key == nodes[other].key:
        return nodes[one].position < nodes[other].position  # type: ignore[no-any-return]
    return nodes[one].key > nodes[other].key  # type: ignore[no-any-return]


@view_part
def _meld(nodes: Records, one: int, other: int) -> int:
    """The head of two heaps made one."""
    if one == NONE:
        return other
    if other == NONE:
        return one
    if _is_better(nodes, other, one):
        one, other = other, one
    below = nodes[one].first_below
    nodes[other].next_beside, nodes[other].before = below, one
    if below != NONE:
        nodes[below].before = other
    nodes[one].first_below = other
    return one


@view_part
def _meld_below(nodes: Records, node: int) -> int:
    """The head of what is below a node: in pairs first, which keeps heaps flat."""
    one, pairs, head = nodes[node].first_below, NONE, NONE
    while one != NONE:
        other = nodes[one].next_beside
        following = NONE if other == NONE else nodes[other].next_beside
        _detach(nodes, one)
        if other != NONE:
            _detach(nodes, other)
        pair = _meld(nodes, one, other)
        nodes[pair].next_beside = pairs
        pairs, one = pair, following
    while pairs != NONE:
        following = nodes[pairs].next_beside
        nodes[pairs].next_beside = NONE
        head = _meld(nodes, head, pairs)
        pairs = following
    return head


@view_part
def _detach(nodes: Records, node: int) -> None:
    nodes[node].next_beside = nodes[node].before = NONE
