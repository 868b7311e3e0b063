"""One request on the draft's side: its committed text, the tree of possible continuations, and the pages behind both.

Every node is a token that may follow; its path probability is the chance that the target's text will pass through it.
A node is *computed* when its key and value lie on a branch and the draft has said what follows it. A branch is a block
table: branches share full pages, and exactly one of them owns the writable slots of a partly filled page. Pages full of
committed text are held by the request's trunk alone: a branch of a long text costs no more than one of a short text.

Nodes, candidates and branches are rows of arrays that compiled steps work on: a node is made, chosen and expanded in about a
microsecond. What falls away with a commit leaves no gap; whatever outlives one is renumbered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_double.draft import _tree_steps as at
from vllm_double.draft._tree_steps import MAX_AHEAD, NONE, TREE_LENGTH, steps
from vllm_double.draft.noise_coupling import Listing
from vllm_double.draft.page_pool import PagePool, page_key, partition_key
from vllm_double.prefix_hash import mix, seed
from vllm_double.transport.messages import Admit

__all__ = ["MAX_AHEAD", "DraftRequest", "Node"]

_MIN_CAPACITY = 128
_MIN_TEXT = 256


class DraftRequest:
    """Text and tree of one admission. ``base`` is the length at admission, from which prefix hashes are counted.

    ``sampling``: an entry of SAMPLING_DTYPE, without the noise's scale.

    ``address`` is that of the tree's header. ``num_children``: the draft lists at most so many tokens behind a node.
    ``num_speculative_tokens``: no node lies deeper behind the text and the chain that is verified.
    """

    def __init__(
        self, admission: Admit, pool: PagePool, page_size: int, num_children: int, num_speculative_tokens: int, longest: int
    ) -> None:
        self.handle = handle = admission.handle
        self.tenant = admission.tenant or None
        self.epoch = admission.epoch
        self.base = admission.base
        self.temperature = admission.temperature
        self.is_awaited = False  # the target waits for what follows the text
        self.sampling = admission.seed, admission.temperature, 0.0, admission.top_k, admission.top_p, admission.min_p
        self._listings: dict[int, dict[int, Listing]] = {}  # of a sampled request, by the length of the text in front
        self._pool = pool
        self._page_size = page_size
        self._steps = steps()
        self._header = np.zeros(TREE_LENGTH, np.int64)
        self.address = self._header.ctypes.data
        self._stops = np.array(admission.stop_token_ids, np.int32)
        self._trunk = np.zeros(-(-longest // page_size) + 1, np.int32)
        self._text = np.zeros(_MIN_TEXT, np.int32)
        self._hashes = [seed(handle)]  # of text[:base], text[:base + 1], ...
        # And of the text's full pages, as far as they were asked for.
        self._page_keys = [partition_key(self.tenant, self.epoch)]
        self._num_inserted = 0  # pages of the trunk that are in the prefix cache: they are not written any more
        self._num_children = num_children
        # A branch leaves the text's, or another branch, within the reach of one commit, and ends within that of a later one.
        self._branch_pages = (4 * num_speculative_tokens + 2) // page_size + 3
        header = self._header
        header[at.HANDLE], header[at.MAX_LENGTH], header[at.PAGE_SIZE] = _signed(handle), admission.max_length, page_size
        header[at.NUM_STOPS], header[at.NUM_CHILDREN] = len(self._stops), num_children
        header[at.BRANCH_PAGES], header[at.NUM_BRANCHES] = self._branch_pages, 1
        header[[at.STOPS_AT, at.TRUNK_AT, at.TEXT_AT]] = [a.ctypes.data for a in (self._stops, self._trunk, self._text)]
        self._arrays: list[npt.NDArray[Any]] = []
        self._allocate(_MIN_CAPACITY)

    def _allocate(self, capacity: int) -> None:
        """Arrays for so many nodes, with what was in the old ones."""
        old = self._arrays
        shapes: list[tuple[tuple[int, ...], type[np.generic]]] = [
            ((capacity, at.NODE_COLUMNS), np.int32),
            ((capacity,), np.uint64),
            ((capacity,), np.float64),
            ((capacity, self._num_children), np.int32),
            ((capacity, self._num_children), np.float32),
            ((capacity, MAX_AHEAD), np.int32),
            ((capacity, MAX_AHEAD), np.float32),
            ((3 * capacity,), np.float64),
            ((3 * capacity, 3), np.int32),
            ((capacity + 1, at.BRANCH_COLUMNS), np.int32),
            ((capacity + 1, self._branch_pages), np.int32),
        ]
        self._arrays = [np.zeros(shape, dtype) for shape, dtype in shapes]
        for new, before in zip(self._arrays, old, strict=False):
            new[: len(before)] = before
        self._nodes, self._branches, self._pages = self._arrays[0], self._arrays[-2], self._arrays[-1]
        self._header[at.NODES_AT : at.PAGES_AT + 1] = [array.ctypes.data for array in self._arrays]
        self._header[at.CAPACITY] = capacity

    def reserve(self, num_nodes: int) -> None:
        """Make room for so many nodes more."""
        needed, capacity = int(self._header[at.NUM_NODES]) + num_nodes, int(self._header[at.CAPACITY])
        if needed > capacity:
            self._allocate(max(2 * capacity, needed))

    # ---- text -------------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Of the committed text."""
        return int(self._header[at.LENGTH])

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """The committed text; a view that is good until the next commit."""
        return self._text[: self._header[at.LENGTH]]

    @property
    def num_cached(self) -> int:
        """Committed positions whose keys and values lie on the trunk."""
        return int(self._header[at.NUM_CACHED])

    @property
    def num_expanded(self) -> int:
        """Nodes expanded since the last commit."""
        return int(self._header[at.NUM_EXPANDED])

    @property
    def is_whole(self) -> bool:
        """Whether the whole text at admission is here: there is a root, the last committed token."""
        return bool(self._header[at.NUM_NODES] > 0)

    @property
    def num_trunk_pages(self) -> int:
        """Of the committed text, and maybe some behind it."""
        return int(self._branches[0, at.NUM_BRANCH_PAGES])

    def commit(self, keep: int, tokens: Sequence[int]) -> int:
        """Make the text ``text[:keep] + tokens``; returns how many of ``tokens`` the tree had foreseen.

        Raises ValueError where ``keep`` lies beyond the text, or before the admission once the text has passed it.
        """
        length = self.length
        if keep > length or (keep < length and keep < self.base):
            raise ValueError(f"cannot keep {keep} tokens of {length} (admitted with {self.base})")
        if keep < length:
            self._rewind(keep)
        end = keep + len(tokens)
        if end > len(self._text):
            self._text = np.concatenate([self._text, np.zeros(max(len(self._text), end), np.int32)])
            self._header[at.TEXT_AT] = self._text.ctypes.data
        self._text[keep:end] = tokens
        self._header[at.LENGTH] = end
        for token in tokens[max(0, self.base - keep) :]:
            self._hashes.append(mix(self._hashes[-1], token))
        if end < self.base or end == 0:
            return 0  # the text at admission is still arriving
        # A prompt may end with a stop token.
        self._header[at.HAS_ENDED] = end > self.base and self._text[end - 1] in self._stops
        return self._steps.commit(self.address, self._pool.address, len(tokens), _signed(self._hashes[-1]))

    def _rewind(self, keep: int) -> None:
        self._steps.forget_all(self.address, self._pool.address)
        del self._hashes[keep - self.base + 1 :]
        del self._page_keys[keep // self._page_size + 1 :]
        self._recompute_from(keep)

    def follow(self, chain: npt.NDArray[np.int32], log_probs: npt.NDArray[np.floating[Any]]) -> None:
        """Take note of the chain that the target verifies now: a path from the root, with log-probabilities per token."""
        self.reserve(len(chain))
        tokens, values = np.ascontiguousarray(chain, np.int32), np.ascontiguousarray(log_probs, np.float64)
        self._steps.follow(self.address, len(chain), tokens.ctypes.data, values.ctypes.data)

    # ---- what was drawn ---------------------------------------------------------------------------------------

    def note_listing(self, length: int, prefix_hash: int, listing: Listing) -> None:
        """Keep what the draft lists behind a text of so many tokens, until it is known what is drawn there."""
        self._listings.setdefault(length, {})[prefix_hash] = listing

    def drawn(self, num_new: int) -> Iterator[tuple[Listing, int]]:
        """For each of the newest committed tokens whose list is known: the list, and the token."""
        for length in range(max(self.length - num_new, self.base), self.length):
            listing = self._listings.pop(length, {}).get(self._hashes[length - self.base])
            if listing is not None:
                yield listing, int(self._text[length])

    # ---- pages ------------------------------------------------------------------------------------------------

    def match_prefix(self) -> int:
        """Take the longest run of pages that the prefix cache has for the text at admission, from where the cached text ends.

        At least its last token is left to be read. Returns how many tokens need no reading now.
        """
        size, before = self._page_size, self.num_cached
        pages: list[int] = []
        for index in range(before // size, (min(self.length, self.base) - 1) // size):
            page = self._pool.lookup(self._page_key(index))
            if page is None:
                break
            pages.append(page)
        if not pages:
            return 0
        self._steps.truncate(self.address, self._pool.address, before - before % size)
        self._pool.share(pages)
        for page in pages:
            self._steps.append_page(self.address, page)
        self._num_inserted = self.num_trunk_pages
        self._set_cached(self._num_inserted * size)
        return self.num_cached - before

    def _set_cached(self, length: int) -> None:
        self._header[at.NUM_CACHED] = self._branches[0, at.BRANCH_LENGTH] = length

    def insert_prefix(self) -> None:
        """Put full pages of cached text into the prefix cache. No forward that writes them may be under way."""
        while (self._num_inserted + 1) * self._page_size <= self.num_cached:
            self._pool.insert(self._page_key(self._num_inserted), int(self._trunk[self._num_inserted]))
            self._num_inserted += 1

    def _page_key(self, index: int) -> bytes:
        size, keys = self._page_size, self._page_keys
        while len(keys) <= index + 1:
            end = len(keys) * size
            keys.append(page_key(keys[-1], self._text[end - size : end].tolist()))
        return keys[index + 1]

    def _recompute_from(self, length: int) -> None:
        """Have the committed text read again from ``length`` on, and all of a page that is in the prefix cache."""
        if length < self._num_inserted * self._page_size:
            self._num_inserted = length // self._page_size
            length = self._num_inserted * self._page_size
        self._header[at.NUM_CACHED] = min(self.num_cached, length)
        self._steps.truncate(self.address, self._pool.address, self.num_cached)

    def drop_tree(self) -> None:
        """Give up every continuation and its pages; the text and its cached part stay."""
        if self.is_whole:
            self._steps.forget_all(self.address, self._pool.address)
            self._steps.make_root(self.address, int(self.tokens[-1]), _signed(self._hashes[-1]))
            # The root is computed again: its children went with the tree.
            self._recompute_from(self.length - 1)

    def release(self) -> None:
        """Give back all pages, the text's too."""
        self._steps.forget_all(self.address, self._pool.address)
        self._steps.truncate(self.address, self._pool.address, 0)
        self._header[at.NUM_CACHED] = self._num_inserted = 0

    # ---- for tests --------------------------------------------------------------------------------------------

    @property
    def root(self) -> Node | None:
        """The last committed token, once the whole text at admission is here."""
        return Node(self, 0) if self.is_whole else None

    def table(self, branch: int) -> list[int]:
        """A branch's block table. Branch 0 is the trunk."""
        first, num_pages = self._branches[branch, [at.FIRST, at.NUM_BRANCH_PAGES]].tolist()
        own = self._trunk if branch == 0 else self._pages[branch]
        return [*self._trunk[:first].tolist(), *own[:num_pages].tolist()]

    def held_pages(self) -> list[list[int]]:
        """The pages that each branch holds."""
        firsts = self._branches[: self._header[at.NUM_BRANCHES], at.FIRST].tolist()
        return [self.table(branch)[first:] for branch, first in enumerate(firsts)]

    def check_integrity(self) -> None:
        """Assert what must hold between two iterations."""
        branches, num_branches = self._branches, int(self._header[at.NUM_BRANCHES])
        holders = [0] * num_branches
        assert self.num_cached <= min(branches[0, at.BRANCH_LENGTH], self.length), "more is cached than there is"
        assert self._header[at.NUM_PUT_BACK] == 0
        if self.root is not None:
            assert self.root.position == self.length - 1 and self.root.token == self._text[self.length - 1], "root"
            assert self.root.prefix_hash == self._hashes[-1], "hash of the root"
            assert len(self._hashes) == self.length - self.base + 1, "hashes"
            stack, num_nodes = [self.root], 0
            while stack:
                node = stack.pop()
                num_nodes += 1
                assert node.column(at.RUN) == NONE and not node.column(at.IS_FRESH)
                if node.branch != NONE:
                    holders[node.branch] += 1
                    assert branches[node.branch, at.BRANCH_LENGTH] > node.position, "a computed node lies beyond its branch"
                for token, child in node.children.items():
                    assert child.token == token and child.column(at.PARENT) == node.index < child.index
                    assert child.position == node.position + 1 and child.prefix_hash == mix(node.prefix_hash, token)
                    assert child.branch == NONE or node.branch != NONE, "computed behind an uncomputed node"
                    assert child.log_prob <= node.log_prob + 1e-6
                    stack.append(child)
            assert num_nodes == self._header[at.NUM_NODES], "a node that is nobody's child"
        size, keys = self._page_size, [partition_key(self.tenant, self.epoch)]
        text = self.tokens.tolist()
        for end in range(size, self.num_cached + 1, size):
            keys.append(page_key(keys[-1], text[end - size : end]))
        assert branches[0, at.FIRST] == 0
        for branch in range(num_branches):
            found = [self._pool.key_of(page) for page in self.table(branch)]
            assert all(key in (None, expected) for key, expected in zip(found, keys[1:], strict=False)), "text of a page"
            assert not any(found[self._num_inserted :]), "a page of the prefix cache may be written"
            assert branches[branch, at.NUM_HELD] == holders[branch] and (holders[branch] or not branch), "holders of a branch"
            assert len(found) >= math.ceil(branches[branch, at.BRANCH_LENGTH] / size), "pages of a branch"


class Node:
    """A look at a token of a tree, at ``position``; good until the next commit. ``prefix_hash`` names the text up to it."""

    def __init__(self, request: DraftRequest, index: int) -> None:
        self.request = request
        self.index = index

    def column(self, column: int) -> int:
        """An entry of the node's row, see `_tree_steps`."""
        return int(self.request._nodes[self.index, column])

    token = property(lambda self: self.column(at.TOKEN))
    position = property(lambda self: self.column(at.POSITION))
    branch = property(lambda self: self.column(at.BRANCH))
    is_retrieved = property(lambda self: bool(self.column(at.IS_RETRIEVED)))
    prefix_hash = property(lambda self: int(self.request._arrays[1][self.index]))
    log_prob = property(lambda self: float(self.request._arrays[2][self.index]))

    @property
    def children(self) -> dict[int, Node]:
        """By token."""
        found, child = {}, self.column(at.FIRST_CHILD)
        while child != NONE:
            node = Node(self.request, child)
            found[node.token] = node
            child = node.column(at.NEXT_SIBLING)
        return found

    @property
    def alternatives(self) -> list[int]:
        """What the draft listed behind it, best first."""
        return self.request._arrays[3][self.index, : self.column(at.NUM_LISTED)].tolist()  # type: ignore[no-any-return]

    @property
    def alternative_log_probs(self) -> list[float]:
        """Given the node."""
        return self.request._arrays[4][self.index, : self.column(at.NUM_LISTED)].tolist()  # type: ignore[no-any-return]


def _signed(number: int) -> int:
    """The bits of an unsigned 64-bit number as a signed one: compiled steps take no others."""
    return number - (1 << 64) if number >= 1 << 63 else number
