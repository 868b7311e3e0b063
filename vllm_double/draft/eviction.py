"""What is given up if nodes or pages run out: the paths that are the least probable."""

from vllm_double.draft.arena import NONE, Arena
from vllm_double.draft.branches import truncate
from vllm_double.draft.candidates import remove
from vllm_double.draft.page_pool import num_available
from vllm_double.draft.request_tree import free_node, list_next
from vllm_double.jit import view_part

__all__ = ["evict"]


@view_part
def _evict_leaf(arena: Arena, node: int) -> int:
    """Take a leaf out of its tree; its parent, which lists it again if it is computed."""
    nodes, parent, branch = arena.nodes, arena.nodes[node].parent, arena.nodes[node].branch
    if nodes[node].is_candidate:
        remove(nodes, arena.requests, node)
    if branch != NONE:
        truncate(arena, branch, nodes[node].position)
    before = nodes[parent].first_child
    if before == node:
        nodes[parent].first_child = nodes[node].next_sibling
    else:
        while nodes[before].next_sibling != node:
            before = nodes[before].next_sibling
        nodes[before].next_sibling = nodes[node].next_sibling
    free_node(arena, node, NONE)
    arena.totals[0].nodes_evicted += 1
    if nodes[parent].branch != NONE and not nodes[parent].is_fresh:
        if nodes[parent].is_candidate:
            remove(nodes, arena.requests, parent)
        nodes[parent].next_listed = 0
        list_next(arena, parent)
    return parent  # type: ignore[no-any-return]


@view_part
def _worth(arena: Arena, node: int) -> float:
    """Log-probability of a leaf that may be evicted, from its root; 1.0 for all other nodes."""
    it = arena.nodes[node]
    if it.slot == NONE or it.first_child != NONE or it.parent == NONE or it.is_picked or it.is_fresh:
        return 1.0
    return it.log_prob - arena.nodes[arena.requests[it.slot].root].log_prob  # type: ignore[no-any-return]


def evict(arena: Arena, bound: float, num_pages: int, num_nodes: int) -> bool:
    """Give up the least probable paths, all below ``bound``, until so many pages and nodes are free; False if they are not.

    More are given up than need be, so that this happens seldom: those below the mean of the least probable and the bound.
    """
    limit = 1.0
    for node in range(len(arena.nodes)):
        limit = min(limit, _worth(arena, node))
    bound = min(bound, 0.5)
    for attempt in range(6):
        if num_available(arena.totals) >= num_pages and arena.totals[0].num_free_nodes >= num_nodes:
            return True
        if limit >= bound:
            return False
        limit = (limit + bound) / 2 if attempt < 4 else bound
        for start in range(len(arena.nodes)):
            node = start
            while node != NONE and _worth(arena, node) < limit:
                node = _evict_leaf(arena, node)
    return False
