"""One request on the draft's side: its committed text, the tree of possible continuations, and the pages behind both.

Every node is a token that may follow; its path probability is the chance that the target's text will pass through it.
A node is *computed* when its key and value lie on a branch and the draft has said what follows it. A branch is a block
table: branches share full pages, and exactly one of them owns the writable slots of a partly filled page.
"""

import heapq
import itertools
import math
from array import array
from collections.abc import Sequence

from vllm_double.draft.pages import PagePool, page_key, partition_key
from vllm_double.hashing import mix, seed

__all__ = ["Branch", "DraftRequest", "Node"]

_order = itertools.count()
_ITSELF = -1


class Branch:
    """A block table: ``table[p // page_size]`` holds position p, for p < length.

    Pages before ``first`` are full of committed text and held by the request's trunk, which has the same ones there: a branch
    of a long text costs no more than one of a short text.
    """

    __slots__ = ("first", "holders", "length", "table")

    def __init__(self, table: "array[int]", length: int, first: int = 0) -> None:
        self.table = table  # the engine takes it over as one piece of memory
        self.length = length
        self.first = first
        self.holders = 0  # computed nodes on it, plus one where it is the trunk


class Node:
    """A token at ``position``; ``prefix_hash`` names the text up to and including it."""

    __slots__ = (
        "ahead",
        "alive",
        "alternative_log_probs",
        "alternatives",
        "branch",
        "children",
        "is_retrieved",
        "log_prob",
        "parent",
        "position",
        "prefix_hash",
        "token",
    )

    def __init__(self, token: int, position: int, prefix_hash: int, parent: "Node | None", log_prob: float) -> None:
        self.token = token
        self.position = position
        self.prefix_hash = prefix_hash
        self.parent = parent
        self.log_prob = log_prob  # of the whole path since admission: only differences below one root mean anything
        self.children: dict[int, Node] = {}
        # What the draft listed, best first. Lists of plain numbers: pairs would keep the garbage collector busy.
        self.alternatives: list[int] = []
        self.alternative_log_probs: list[float] = []
        self.branch: Branch | None = None
        self.alive = True
        self.is_retrieved = False
        self.ahead: list[tuple[int, float]] = []  # what was retrieved behind it, with log-probabilities, last token first


# Negative log-probability of the path, a tie-breaker, a node, and which of its alternatives is meant (_ITSELF: the node).
# Only the best alternative of a node that has not become a node yet is a candidate: most alternatives never become one.
_Candidate = tuple[float, int, Node, int]


class DraftRequest:
    """Text and tree of one admission. ``base`` is the length at admission, from which prefix hashes are counted."""

    def __init__(
        self, handle: int, base: int, temperature: float, max_length: int, stop_token_ids: Sequence[int], pool: PagePool,
        page_size: int, tenant: str | None = None, epoch: int = 0,
    ) -> None:  # fmt: skip
        self.handle = handle
        self.tenant = tenant
        self.epoch = epoch
        self.base = base
        self.temperature = temperature
        self.max_length = max_length
        self.stop_token_ids = frozenset(stop_token_ids)
        self.text: list[int] = []
        self.num_cached = 0  # committed positions whose keys and values lie on the trunk
        self.chain_length = 0  # of the chain that is being verified
        self.num_expanded = 0  # nodes expanded since the last commit
        self._pool = pool
        self._page_size = page_size
        self.trunk = Branch(array("i"), 0)
        self.trunk.holders = 1
        self.root: Node | None = None  # the last committed token, once the whole text at admission is here
        self._hashes = [seed(handle)]  # of text[:base], text[:base + 1], ...
        self._page_keys = [partition_key(tenant, epoch)]  # and of the text's full pages, as far as they were asked for
        self._num_inserted = 0  # pages of the trunk that are in the prefix cache: they are not written any more
        self._candidates: list[_Candidate] = []
        self._deferred: list[_Candidate] = []

    # ---- text -------------------------------------------------------------------------------------------------

    def commit(self, keep: int, tokens: Sequence[int]) -> int:
        """Make the text ``text[:keep] + tokens``; returns how many of ``tokens`` the tree had foreseen.

        Raises ValueError where ``keep`` lies beyond the text, or before the admission once the text has passed it.
        """
        if keep > len(self.text) or (keep < len(self.text) and keep < self.base):
            raise ValueError(f"cannot keep {keep} tokens of {len(self.text)} (admitted with {self.base})")
        if keep < len(self.text):
            self._rewind(keep)
        node, matched = self.root, 0
        for token in tokens:
            child = node.children.get(token) if node is not None else None
            if child is None:
                break
            node, matched = child, matched + 1
        for token in tokens:
            self.text.append(token)
            if len(self.text) > self.base:
                self._hashes.append(mix(self._hashes[-1], token))
        if tokens or self.root is None:
            self._move_root(node if matched == len(tokens) else None, node)
        self.num_expanded = 0
        self.chain_length = 0
        for candidate in self._deferred:
            heapq.heappush(self._candidates, candidate)
        self._deferred.clear()
        return matched

    def _rewind(self, keep: int) -> None:
        if self.root is not None:
            self._drop(self.root)
            self.root = None
        del self.text[keep:]
        del self._hashes[keep - self.base + 1 :]
        del self._page_keys[keep // self._page_size + 1 :]
        self._recompute_from(keep)

    def _move_root(self, new_root: Node | None, deepest: Node | None) -> None:
        """Re-root at ``new_root``, or at a fresh node where the text was not foreseen beyond ``deepest``."""
        if len(self.text) < self.base or not self.text:
            return  # the text at admission is still arriving
        cached = deepest
        while cached is not None and cached.branch is None:
            cached = cached.parent
        if cached is not None and cached.branch is not None:
            self._hold(cached.branch)
            # Whoever is the trunk holds the pages of the committed text.
            self.trunk.first, cached.branch.first = cached.branch.first, 0
            self._let_go(self.trunk)
            self.trunk, self.num_cached = cached.branch, cached.position + 1
        old_root = self.root
        if new_root is None:
            new_root = Node(self.text[-1], len(self.text) - 1, self._hashes[-1], None, 0.0)
        if old_root is not None and old_root is not new_root:
            self._drop(old_root, keep=new_root)
        new_root.parent = None
        self.root = new_root

    def follow(self, chain: Sequence[int], log_probs: Sequence[float]) -> None:
        """Take note of the chain that the target verifies now: a path from the root, with log-probabilities per token."""
        node = self.root
        if node is None:
            return
        self.chain_length = len(chain)
        for token, log_prob in zip(chain, log_probs, strict=True):
            node = self.child(node, token, log_prob)

    # ---- tree -------------------------------------------------------------------------------------------------

    def child(self, node: Node, token: int, log_prob: float) -> Node:
        """The child of ``node`` for ``token``; made, with ``log_prob`` given its parent, where there is none yet."""
        child = node.children.get(token)
        if child is None:
            child = self._make(node, token, log_prob)
            if self._may_go_on(child):
                self._push(child, child.log_prob, _ITSELF)
        return child

    def expand(self, node: Node, tokens: list[int], log_probs: list[float]) -> None:
        """Note what the draft says behind a computed node, best first. Of a retrieved child the draft knows better."""
        node.alternatives, node.alternative_log_probs = tokens, log_probs
        for child in node.children.values():
            if child.is_retrieved:
                if child.token in tokens:
                    said = log_probs[tokens.index(child.token)]
                else:
                    unsaid = 1.0 - sum(map(math.exp, log_probs))
                    said = min(log_probs[-1], math.log(max(unsaid, 1e-9)))
                child.log_prob = node.log_prob + said
        self._push_alternative(node, 0)

    def retrieved(self, node: Node, path: Sequence[tuple[int, float]]) -> None:
        """Note tokens that were retrieved behind a node without children, with log-probabilities."""
        node.ahead = list(reversed(path))

    def look_ahead(self, node: Node) -> None:
        """Make the next token that was retrieved behind ``node`` its child, and the others the child's."""
        if not node.ahead:
            return
        token, log_prob = node.ahead.pop()
        child = self.child(node, token, log_prob)
        child.is_retrieved = True
        child.ahead, node.ahead = node.ahead, []

    def _make(self, node: Node, token: int, log_prob: float) -> Node:
        child = Node(token, node.position + 1, mix(node.prefix_hash, token), node, node.log_prob + log_prob)
        node.children[token] = child
        return child

    def _may_go_on(self, node: Node) -> bool:
        """Whether it is of use to know what follows ``node``."""
        return node.token not in self.stop_token_ids and node.position + 1 < self.max_length

    def _push(self, node: Node, log_prob: float, index: int) -> None:
        heapq.heappush(self._candidates, (-log_prob, next(_order), node, index))

    def _push_alternative(self, node: Node, index: int) -> None:
        """Make the first alternative from ``index`` on that may become a node a candidate."""
        if node.position + 2 >= self.max_length:
            return
        for place in range(index, len(node.alternatives)):
            token = node.alternatives[place]
            if token not in node.children and token not in self.stop_token_ids:
                self._push(node, node.log_prob + node.alternative_log_probs[place], place)
                return

    def best_candidate(self) -> tuple[float, int] | None:
        """Path log-probability from the root, and position, of the most probable node that is not computed yet."""
        heap = self._candidates
        while heap:
            negative, _, node, index = heap[0]
            if node.alive and index == _ITSELF:
                if -negative != node.log_prob:  # the draft knew better, see `expand`
                    heapq.heapreplace(heap, (-node.log_prob, next(_order), node, _ITSELF))
                    continue
                # The root is committed text, and read as such.
                if node.branch is None and node is not self.root:
                    break
            elif node.alive:
                if node.alternatives[index] not in node.children:
                    break
                heapq.heappop(heap)
                self._push_alternative(node, index + 1)
                continue
            heapq.heappop(heap)
        if not heap:
            return None
        assert self.root is not None
        negative, _, node, index = heap[0]
        return -negative - self.root.log_prob, node.position + (index != _ITSELF)

    def take_candidate(self) -> Node:
        """The node that ``best_candidate`` told of; no candidate any more."""
        _, _, node, index = heapq.heappop(self._candidates)
        if index == _ITSELF:
            return node
        self._push_alternative(node, index + 1)
        return self._make(node, node.alternatives[index], node.alternative_log_probs[index])

    def path_to(self, node: Node) -> list[int]:
        """Tokens behind the root up to and including ``node``."""
        path: list[int] = []
        while node is not self.root and node.parent is not None:
            path.append(node.token)
            node = node.parent
        path.reverse()
        return path

    def put_back(self, node: Node) -> None:
        """Make ``node`` a candidate again."""
        self._push(node, node.log_prob, _ITSELF)

    def defer_candidate(self) -> None:
        """Keep what ``best_candidate`` told of from being a candidate until the next commit."""
        self._deferred.append(heapq.heappop(self._candidates))

    @property
    def has_ended(self) -> bool:
        """Whether the target has said a stop token; a prompt may end with one."""
        return len(self.text) > self.base and self.text[-1] in self.stop_token_ids

    def deepest_allowed(self, num_speculative_tokens: int) -> int:
        """Positions beyond this one are deeper than num_speculative_tokens behind any outcome of the verification."""
        return len(self.text) + self.chain_length + num_speculative_tokens

    def computed(self, node: Node, branch: Branch) -> None:
        """Say that the key and value of ``node`` lie on ``branch``, or will after the forward that is being made up."""
        node.branch = branch
        self._hold(branch)
        self.num_expanded += 1

    # ---- pages ------------------------------------------------------------------------------------------------

    def match_prefix(self) -> int:
        """Take the longest run of pages that the prefix cache has for the text at admission, from where the cached text ends.

        At least its last token is left to be read. Returns how many tokens need no reading now.
        """
        size, before = self._page_size, self.num_cached
        pages: list[int] = []
        for index in range(before // size, (min(len(self.text), self.base) - 1) // size):
            page = self._pool.lookup(self._page_key(index))
            if page is None:
                break
            pages.append(page)
        if pages:
            self._truncate(self.trunk, before - before % size)
            self._pool.share(pages)
            self.trunk.table.extend(pages)
            self._num_inserted = len(self.trunk.table)
            self.num_cached = self.trunk.length = self._num_inserted * size
        return self.num_cached - before

    def insert_prefix(self) -> None:
        """Put full pages of cached text into the prefix cache. No forward that writes them may be under way."""
        while (self._num_inserted + 1) * self._page_size <= self.num_cached:
            self._pool.insert(self._page_key(self._num_inserted), self.trunk.table[self._num_inserted])
            self._num_inserted += 1

    def _page_key(self, index: int) -> bytes:
        size, keys = self._page_size, self._page_keys
        while len(keys) <= index + 1:
            end = len(keys) * size
            keys.append(page_key(keys[-1], self.text[end - size : end]))
        return keys[index + 1]

    def _recompute_from(self, length: int) -> None:
        """Have the committed text read again from ``length`` on, and all of a page that is in the prefix cache."""
        if length < self._num_inserted * self._page_size:
            self._num_inserted = length // self._page_size
            length = self._num_inserted * self._page_size
        self.num_cached = min(self.num_cached, length)
        self._truncate(self.trunk, self.num_cached)

    def extend(self, anchor: Node | None, num_tokens: int, copies: dict[int, tuple[int, int]]) -> Branch:
        """A branch on which ``num_tokens`` are going to be written behind ``anchor`` (behind the cached text where None).

        Notes (source page, used slots) in ``copies``, by destination page. Raises OutOfPagesError, and changes nothing then.
        """
        branch = self.trunk if anchor is None else anchor.branch
        length = self.num_cached if anchor is None else anchor.position + 1
        assert branch is not None
        size = self._page_size
        own = branch.length == length or not self._is_used_beyond(branch, anchor)
        full, used = divmod(length, size)
        copy_tail = used > 0 and (not own or self._pool.is_shared(branch.table[full]))
        num_new = -(-(length + num_tokens) // size) - full - (1 if used and not copy_tail else 0)
        new = self._pool.take(num_new)
        if copy_tail:
            tail = branch.table[full]
            # Where the tail was itself copied a moment ago, in the same iteration, its original still says the same.
            source, _ = copies.get(tail, (tail, 0))
            copies[new[0]] = (source, used)
        if own:
            self._truncate(branch, length)
            if copy_tail:
                self._pool.release([branch.table.pop()])
            branch.table.extend(new)
        else:
            first = self.num_cached // size
            self._pool.share(branch.table[first:full])
            branch = Branch(branch.table[:full] + array("i", new), length, first)
        branch.length = length + num_tokens
        return branch

    def _is_used_beyond(self, branch: Branch, anchor: Node | None) -> bool:
        """Whether a live node behind ``anchor`` lies on ``branch``."""
        if anchor is None:
            # Behind the cached text there are nodes only when the root itself is cached.
            return self.root is not None and self.root.branch is not None
        return any(child.branch is branch for child in anchor.children.values())

    def _truncate(self, branch: Branch, length: int) -> None:
        keep = -(-length // self._page_size)
        assert keep >= branch.first, "pages of the committed text are not the branch's to give up"
        self._pool.release(branch.table[keep:])
        del branch.table[keep:]
        branch.length = min(branch.length, length)

    def _hold(self, branch: Branch) -> None:
        branch.holders += 1

    def _let_go(self, branch: Branch) -> None:
        branch.holders -= 1
        if branch.holders == 0:
            self._pool.release(branch.table[branch.first :])
            branch.table, branch.length = array("i"), 0

    def _drop(self, top: Node, keep: Node | None = None) -> None:
        """Forget ``top`` and all below it but the subtree of ``keep``."""
        stack = [top]
        while stack:
            node = stack.pop()
            if node is keep:
                continue
            node.alive = False
            if node.branch is not None:
                self._let_go(node.branch)
                node.branch = None
            stack.extend(node.children.values())
            # Without cycles nodes are freed at once, and never wait for the garbage collector.
            node.parent, node.children = None, {}

    def drop_tree(self) -> None:
        """Give up every continuation and its pages; the text and its cached part stay."""
        if self.root is not None:
            self._drop(self.root)
            root = Node(self.root.token, self.root.position, self.root.prefix_hash, None, 0.0)
            self.root = root
            self._candidates.clear()
            self._deferred.clear()
            # The root is computed again: its children went with the tree.
            self._recompute_from(root.position)

    def release(self) -> None:
        """Give back all pages, the text's too."""
        if self.root is not None:
            self._drop(self.root)
        self._let_go(self.trunk)
        self.trunk = Branch(array("i"), 0)
        self.trunk.holders = 1
        self.num_cached = self._num_inserted = 0
        self.root = None

    def branches(self) -> list[Branch]:
        """Every branch that holds pages."""
        found = {id(self.trunk): self.trunk}
        stack = [self.root] if self.root is not None else []
        while stack:
            node = stack.pop()
            if node.branch is not None:
                found[id(node.branch)] = node.branch
            stack.extend(node.children.values())
        return list(found.values())

    def check_integrity(self) -> None:
        """Assert what must hold between two iterations."""
        holders: dict[int, int] = {id(self.trunk): 1}
        assert self.num_cached <= min(self.trunk.length, len(self.text)), "more is cached than there is"
        if self.root is not None:
            assert self.root.position == len(self.text) - 1 and self.root.token == self.text[-1], "root"
            assert self.root.prefix_hash == self._hashes[-1], "hash of the root"
            assert len(self._hashes) == len(self.text) - self.base + 1, "hashes"
            stack = [self.root]
            while stack:
                node = stack.pop()
                assert node.alive
                if node.branch is not None:
                    holders[id(node.branch)] = holders.get(id(node.branch), 0) + 1
                    assert node.branch.length > node.position, "a computed node lies beyond its branch"
                for token, child in node.children.items():
                    assert child.token == token and child.parent is node and child.position == node.position + 1
                    assert child.branch is None or node.branch is not None, "computed behind an uncomputed node"
                    assert child.log_prob <= node.log_prob + 1e-9
                    stack.append(child)
        size, keys = self._page_size, [partition_key(self.tenant, self.epoch)]
        for end in range(size, self.num_cached + 1, size):
            keys.append(page_key(keys[-1], self.text[end - size : end]))
        assert self.trunk.first == 0
        for branch in self.branches():
            assert branch.table[: branch.first] == self.trunk.table[: branch.first], "not the trunk's pages"
            found = [self._pool.key_of(page) for page in branch.table]
            assert all(key in (None, expected) for key, expected in zip(found, keys[1:], strict=False)), "text of a page"
            assert not any(found[self._num_inserted :]), "a page of the prefix cache may be written"
            assert branch.holders == holders.get(id(branch), 0), "holders of a branch"
            assert len(branch.table) >= math.ceil(branch.length / size), "pages of a branch"
