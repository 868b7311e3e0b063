"""A look into a frontier's arena for tests: texts, trees and block tables by name, and what must hold of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_double.draft.arena import NONE
from vllm_double.draft.frontier import Frontier
from vllm_double.draft.page_pool import PagePool, page_key
from vllm_double.prefix_hash import mix, seed


def trees(frontier: Frontier) -> dict[int, Tree]:
    """By handle."""
    return {handle: Tree(frontier, request.slot) for handle, request in frontier._requests.items()}


def outputs(frontier: Frontier) -> list[Node]:
    """The nodes that the latest batch's outputs stand behind."""
    num_outputs = frontier._forward.progress["num_outputs"][0]
    return [Node(frontier, index) for index in frontier._forward.outputs[:num_outputs].tolist()]


def run_handles(frontier: Frontier) -> list[int]:
    """Whose each row of the latest batch is."""
    slots = frontier._forward.runs["slot"][: frontier._forward.progress["num_runs"][0]].tolist()
    return [frontier._by_slot[slot].handle for slot in slots]


class Tree:
    """One request; good until its release."""

    def __init__(self, frontier: Frontier, slot: int) -> None:
        self.frontier, self.slot = frontier, slot

    def __getattr__(self, name: str) -> Any:
        """A field of the request's record."""
        return self.frontier._arena.requests[name][self.slot].item()

    @property
    def root(self) -> Node | None:
        """The last committed token, once the whole text at admission is here."""
        index = self.__getattr__("root")
        return Node(self.frontier, index) if index != NONE else None

    @property
    def tokens(self) -> list[int]:
        return self.frontier._arena.texts[self.slot, : self.length].tolist()  # type: ignore[no-any-return]

    def table(self, branch: int | None = None) -> list[int]:
        """A branch's block table; None: the trunk's."""
        branch = self.trunk if branch is None else branch
        arena, entry = self.frontier._arena, self.frontier._arena.branches[branch]
        own = arena.trunks[self.slot] if branch == self.trunk else arena.branch_pages[branch]
        return [*arena.trunks[self.slot, : entry["first"]].tolist(), *own[: entry["num_pages"]].tolist()]

    @property
    def branches(self) -> list[int]:
        return (self.frontier._arena.branches["slot"] == self.slot).nonzero()[0].tolist()  # type: ignore[no-any-return]

    def held_pages(self) -> list[list[int]]:
        """The pages that each branch holds."""
        return [self.table(branch)[self.frontier._arena.branches["first"][branch] :] for branch in self.branches]

    def check_integrity(self) -> None:
        """Assert what must hold between two iterations."""
        arena, frontier = self.frontier._arena, self.frontier
        holders = dict.fromkeys(self.branches, 0)
        assert self.num_cached <= min(arena.branches["length"][self.trunk], self.length), "more is cached than there is"
        text, expected = self.tokens, seed(self.handle)
        for token in text[self.num_admitted :]:
            expected = mix(expected, token)
        candidates = {node.index for node in heap(frontier, self.best)}
        if self.root is not None:
            assert self.root.position == self.length - 1 and self.root.token == text[-1] and self.root.parent == NONE, "root"
            assert self.root.prefix_hash == self.hash == expected, "hash of the root"
            found = set()
            stack = [self.root]
            while stack:
                node = stack.pop()
                found.add(node.index)
                assert node.slot == self.slot and node.run == NONE
                assert not (node.is_fresh or node.is_picked or node.is_tip)
                assert node.is_candidate == (node.index in candidates)
                if node.branch != NONE:
                    holders[node.branch] += 1
                    assert arena.branches["length"][node.branch] > node.position, "a computed node lies beyond its branch"
                for token, child in node.children.items():
                    assert child.token == token and child.parent == node.index
                    assert child.position == node.position + 1 and child.prefix_hash == mix(node.prefix_hash, token)
                    assert child.branch == NONE or node.branch != NONE, "computed behind an uncomputed node"
                    assert child.log_prob <= node.log_prob + 1e-6
                    stack.append(child)
            assert found == set((arena.nodes["slot"] == self.slot).nonzero()[0].tolist()), "a node that is nobody's child"
            assert candidates <= found
        size = frontier._page_size
        request = frontier._requests[self.handle]
        keys = [request.prefix._keys[0]]
        for end in range(size, self.num_cached + 1, size):
            keys.append(page_key(keys[-1], text[end - size : end]))
        assert arena.branches["first"][self.trunk] == 0
        for branch in self.branches:
            found_keys = [key_of(frontier._pool, page) for page in self.table(branch)]
            assert all(key in (None, known) for key, known in zip(found_keys, keys[1:], strict=False)), "text of a page"
            assert not any(found_keys[self.num_inserted :]), "a page of the prefix cache may be written"
            entry = arena.branches[branch]
            assert entry["num_held"] == holders[branch] and (holders[branch] or branch == self.trunk), "holders of a branch"
            assert len(found_keys) >= math.ceil(entry["length"] / size), "pages of a branch"


class Node:
    """A look at a token of a tree; good until the next commit. ``prefix_hash`` names the text up to it."""

    def __init__(self, frontier: Frontier, index: int) -> None:
        self.frontier, self.index = frontier, index

    def __getattr__(self, name: str) -> Any:
        """A field of the node's record."""
        return self.frontier._arena.nodes[name][self.index].item()

    @property
    def prefix_hash(self) -> int:
        return self.hash  # type: ignore[no-any-return]

    @property
    def handle(self) -> int:
        """Whose it is."""
        return self.frontier._by_slot[self.slot].handle

    @property
    def children(self) -> dict[int, Node]:
        """By token."""
        found, child = {}, self.first_child
        while child != NONE:
            node = Node(self.frontier, child)
            found[node.token] = node
            child = node.next_sibling
        return found

    @property
    def alternatives(self) -> list[int]:
        """What the draft listed behind it, best first."""
        return self.frontier._arena.listed["token"][self.index, : self.num_listed].tolist()  # type: ignore[no-any-return]

    @property
    def alternative_log_probs(self) -> list[float]:
        """Given the node."""
        probs = self.frontier._arena.listed["prob"][self.index, : self.num_listed].tolist()
        return [math.log(max(prob, 1e-9)) for prob in probs]


def heap(frontier: Frontier, index: int, before: int = NONE) -> Iterable[Node]:
    """The candidates from a node on, with an account of the heap's links."""
    below = before
    while index != NONE:
        node = Node(frontier, index)
        assert node.before == before
        if below != NONE:
            assert node.key <= Node(frontier, below).key
        yield node
        yield from heap(frontier, node.first_below, index)
        before, index = index, node.next_beside


def check_integrity(frontier: Frontier) -> None:
    """Assert that nothing is lost or wrongly shared and that every tree is sound."""
    arena, tables = frontier._arena, []
    for tree in trees(frontier).values():
        tree.check_integrity()
        tables += tree.held_pages()
    check_pool(frontier._pool, tables)
    live = {request.slot for request in frontier._requests.values()}
    assert live == set(arena.requests["is_live"].nonzero()[0].tolist()) == set(frontier._by_slot)
    assert sorted([*live, *frontier._free_slots]) == list(range(len(arena.requests)))
    for records, first, link in ((arena.nodes, "free_node", "next_sibling"), (arena.branches, "free_branch", "next")):
        free, index, links = [], int(arena.totals[first][0]), records[link].tolist()
        while index != NONE:
            free.append(index)
            index = links[index]
        assert sorted(free) == (records["slot"] == NONE).nonzero()[0].tolist(), first
        assert set(records["slot"].tolist()) <= {NONE, *live}
    assert arena.totals["num_free_nodes"][0] == (arena.nodes["slot"] == NONE).sum()


def free_pages(pool: PagePool) -> list[int]:
    """Pages that hold nothing."""
    found, page = [], int(pool.totals["free_page"][0])
    while page != NONE:
        found.append(page)
        page = int(pool.pages["next"][page])
    return found


def key_of(pool: PagePool, page: int) -> bytes | None:
    """The page's key, if it is in the prefix cache."""
    return pool._keys[page] if pool.pages["is_cached"][page] else None


def cached_pages(pool: PagePool) -> dict[bytes, int]:
    """The prefix cache."""
    return {key: page for key, page in pool._pages.items() if key_of(pool, page) == key}


def check_pool(pool: PagePool, held: Iterable[Sequence[int]]) -> None:
    """Assert that the counts are exactly those of ``held``, the block tables of all holders."""
    pages, totals = pool.pages, pool.totals[0]
    expected = [0] * len(pages)
    expected[0] = 1
    for table in held:
        for page in table:
            expected[page] += 1
    assert expected == pages["holders"].tolist(), "page counts differ from the block tables"
    cached = set(pages["is_cached"].nonzero()[0].tolist())
    assert cached == set(cached_pages(pool).values()), "prefix cache"
    assert len(pool._pages) <= len(pages) and len(pool._keys) <= len(pages)
    unheld = {page for page, count in enumerate(expected) if count == 0}
    free = free_pages(pool)
    assert len(free) == totals["num_free_pages"] and set(free) == unheld - cached, "free pages"
    evictable, page = [], int(totals["oldest_page"])
    while page != NONE:
        evictable.append(page)
        page = int(pages["next"][page])
    assert len(evictable) == totals["num_evictable"] and set(evictable) == unheld & cached, "evictable pages"


__all__ = ["Node", "Tree", "cached_pages", "check_integrity", "check_pool", "free_pages", "outputs", "run_handles", "trees"]
