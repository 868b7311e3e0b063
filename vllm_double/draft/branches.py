"""Branches: block tables of a request's paths, which share full pages and fork the last, partly filled one.

Pages full of committed text are held by the request's trunk alone: a branch of a long text costs no more than one of a short.
"""

from vllm_double.draft.arena import NONE, Arena, Forward, integer
from vllm_double.draft.page_pool import num_available, release_page, share_page, take_page
from vllm_double.jit import view_part

__all__ = ["append_page", "extend", "free_branch", "hold", "let_go", "make_trunk", "new_branch", "own_page", "truncate"]


@view_part
def new_branch(arena: Arena, slot: int, first: int) -> int:
    """A branch without pages of its own. There is one for each node."""
    totals, branches = arena.totals, arena.branches
    branch = totals[0].free_branch
    totals[0].free_branch = branches[branch].next
    branches[branch].slot, branches[branch].first = slot, first
    branches[branch].length = branches[branch].num_held = branches[branch].num_pages = 0
    return branch  # type: ignore[no-any-return]


@view_part
def free_branch(arena: Arena, branch: int) -> None:
    """Its pages are somebody else's by now, or released."""
    arena.branches[branch].slot, arena.branches[branch].next = NONE, arena.totals[0].free_branch
    arena.totals[0].free_branch = branch


@view_part
def own_page(arena: Arena, branch: int, index: int) -> int:
    """A branch's own page; that for position ``first`` of the block table has the index 0."""
    slot = arena.branches[branch].slot
    if arena.requests[slot].trunk == branch:
        return integer(arena.trunks[slot, index])
    return integer(arena.branch_pages[branch, index])


@view_part
def _page(arena: Arena, branch: int, index: int) -> int:
    """Entry of a branch's block table."""
    first = arena.branches[branch].first
    if index < first:
        return integer(arena.trunks[arena.branches[branch].slot, index])
    return own_page(arena, branch, index - first)


@view_part
def truncate(arena: Arena, branch: int, length: int) -> None:
    """Give back a branch's own pages behind so many positions."""
    size, own = arena.limits[0].page_size, arena.branches[branch]
    keep = max(0, (length + size - 1) // size - own.first)
    while own.num_pages > keep:  # from the end: of a text that is evicted first
        own.num_pages -= 1
        release_page(arena.pages, arena.totals, own_page(arena, branch, own.num_pages))
    own.length = min(own.length, length)


@view_part
def append_page(arena: Arena, branch: int, page: int) -> None:
    """Behind the branch's pages."""
    own, slot = arena.branches[branch], arena.branches[branch].slot
    if arena.requests[slot].trunk == branch:
        arena.trunks[slot, own.num_pages] = page
    else:
        arena.branch_pages[branch, own.num_pages] = page
    own.num_pages += 1


@view_part
def hold(arena: Arena, branch: int, node: int) -> None:
    """The node's key and value lie on the branch."""
    arena.nodes[node].branch = branch
    arena.branches[branch].num_held += 1


@view_part
def let_go(arena: Arena, node: int, spared: int) -> None:
    """A computed node is going. A branch on which none lies any more is freed, but for the trunk and ``spared``."""
    branch = arena.nodes[node].branch
    arena.branches[branch].num_held -= 1
    if arena.branches[branch].num_held == 0 and branch != spared and branch != arena.requests[arena.nodes[node].slot].trunk:
        truncate(arena, branch, integer(0))
        free_branch(arena, branch)


@view_part
def make_trunk(arena: Arena, slot: int, branch: int) -> None:
    """The branch holds the pages of the text from now on. No node lies on the old trunk behind the text."""
    branches, request = arena.branches, arena.requests[slot]
    old = request.trunk
    if branch == old:
        return
    first, num_pages = branches[branch].first, branches[branch].num_pages
    truncate(arena, old, first * arena.limits[0].page_size)
    for index in range(num_pages):
        arena.trunks[slot, first + index] = arena.branch_pages[branch, index]
    request.trunk = branch
    branches[branch].first, branches[branch].num_pages = 0, first + num_pages
    free_branch(arena, old)


@view_part
def extend(arena: Arena, forward: Forward, slot: int, anchor: int, num_tokens: int) -> int:
    """A branch on which so many tokens are going to be written behind the node ``anchor`` (NONE: behind the cached text).

    NONE if there are not enough pages, and nothing changes then.
    """
    nodes, branches, request, size = arena.nodes, arena.branches, arena.requests[slot], arena.limits[0].page_size
    trunk = request.trunk
    branch, length = trunk, request.num_cached
    is_used_beyond = request.root != NONE and nodes[request.root].branch != NONE
    if anchor != NONE:
        branch, length, is_used_beyond = nodes[anchor].branch, nodes[anchor].position + 1, False
        child = nodes[anchor].first_child
        while child != NONE and not is_used_beyond:
            is_used_beyond = nodes[child].branch == branch
            child = nodes[child].next_sibling
    is_own = branches[branch].length == length or not is_used_beyond
    full, used = length // size, length % size
    copies_tail = used > 0 and (not is_own or arena.pages[_page(arena, branch, full)].holders > 1)
    num_pages = (length + num_tokens + size - 1) // size
    num_new = num_pages - full - (1 if used > 0 and not copies_tail else 0)
    first = branches[branch].first if is_own else request.num_cached // size
    is_trunk = is_own and branch == trunk
    if num_new > num_available(arena.totals) or (not is_trunk and num_pages - first > arena.branch_pages.shape[1]):
        return NONE
    tail = _page(arena, branch, full) if copies_tail else NONE
    if is_own:
        truncate(arena, branch, length)
        if copies_tail:
            branches[branch].num_pages -= 1
    else:
        source, branch = branch, new_branch(arena, slot, first)
        for index in range(first, full):
            page = _page(arena, source, index)
            share_page(arena.pages, arena.totals, page)
            append_page(arena, branch, page)
    for index in range(num_new):
        page = take_page(arena.pages, arena.totals)
        append_page(arena, branch, page)
        if index == 0 and copies_tail:
            _note_copy(forward, tail, page, used)
    if is_own and copies_tail:
        release_page(arena.pages, arena.totals, tail)
    branches[branch].length = length + num_tokens
    return branch  # type: ignore[no-any-return]


@view_part
def _note_copy(forward: Forward, source: int, destination: int, used: int) -> None:
    copies, progress = forward.copies, forward.progress[0]
    at = progress.num_copies
    for i in range(progress.num_copies):
        # If the source was itself copied a moment ago, in the same iteration, its original still says the same.
        if copies[i].destination == source:
            source = copies[i].source
            break
    for i in range(progress.num_copies):
        if copies[i].destination == destination:
            at = i
    copies[at].source, copies[at].destination, copies[at].used = source, destination, used
    progress.num_copies = max(progress.num_copies, at + 1)
