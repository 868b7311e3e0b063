"""Pages of the draft's KV cache: who holds them, which text full ones hold, and when they are free again."""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from vllm_double.draft._page_steps import (
    BEHIND,
    EVICTED_AT,
    FREE_AT,
    HEADER_LENGTH,
    HOLDERS,
    IS_CACHED,
    NEWEST,
    NONE,
    NUM_EVICTABLE,
    NUM_EVICTED,
    NUM_FREE,
    NUM_PAGES,
    OLDEST,
    PAGES_AT,
    steps,
)

__all__ = ["OutOfPagesError", "PagePool", "page_key", "partition_key"]


class OutOfPagesError(Exception):
    """No free page is left; the caller drafts less or lets an idle request go."""


def partition_key(tenant: str | None, epoch: int) -> bytes:
    """What the keys of a tenant's pages begin with in an epoch of the cache, 16 bytes: no other partition's pages are found.

    Who finds a page gets his drafts sooner, and would learn what another sent: tenants share none. Requests that name no tenant
    share theirs, as they do in vLLM's own prefix cache, which tells as much.
    """
    return blake2b(epoch.to_bytes(8, "little") + (tenant or "").encode(), digest_size=16, person=b"partition").digest()


def page_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full page: of its tokens, behind the page (or partition) with the key ``before``.

    A hash of 128 bits, so the tokens are not kept for comparison: a collision could only make wrong drafts, which the target
    rejects.
    """
    return blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Reference counts for ``num_pages`` pages, and a prefix cache over them.

    Page 0 is never handed out: vLLM's kernels may write padding there. A page of the prefix cache is not written any more. When
    nobody holds it, it stays until a page is needed; the one that was released first goes first.

    Nothing is dropped at once when the cache is reset: nobody asks for pages of an older epoch, and they go like others.
    ``prefix_caching``: False keeps no page.

    Counts, free pages and the order of eviction are arrays, which the compiled steps of `tree` change too: ``address`` is their
    header's. Only the keys are Python's: what was evicted is struck off when somebody next looks for a key.
    """

    def __init__(self, num_pages: int, prefix_caching: bool = True) -> None:
        if num_pages < 2:
            raise ValueError(f"the draft's KV cache needs at least 2 pages, not {num_pages}")
        self._prefix_caching = prefix_caching
        self._steps = steps()
        self._table = np.zeros((num_pages, 4), np.int32)
        self._table[0, HOLDERS] = 1
        self._free = np.zeros(num_pages, np.int32)
        self._free[: num_pages - 1] = np.arange(num_pages - 1, 0, -1)
        self._evicted = np.zeros(num_pages, np.int32)
        self._header = np.zeros(HEADER_LENGTH, np.int64)
        self._header[[NUM_PAGES, NUM_FREE, OLDEST, NEWEST]] = num_pages, num_pages - 1, NONE, NONE
        self._header[[PAGES_AT, FREE_AT, EVICTED_AT]] = [a.ctypes.data for a in (self._table, self._free, self._evicted)]
        self.address = self._header.ctypes.data
        self._pages: dict[bytes, int] = {}  # the prefix cache, by key
        self._keys: dict[int, bytes] = {}  # and by page

    @property
    def num_free(self) -> int:
        """Pages that `take` can give."""
        return int(self._header[NUM_FREE] + self._header[NUM_EVICTABLE])

    @property
    def num_pages(self) -> int:
        return len(self._table)

    @property
    def free_pages(self) -> list[int]:
        """Pages that hold nothing."""
        return list(map(int, self._free[: self._header[NUM_FREE]]))

    def num_holders(self, page: int) -> int:
        """How often the page is held."""
        return int(self._table[page, HOLDERS])

    def take(self, count: int) -> list[int]:
        """Pages of the caller's own. Raises OutOfPagesError, and takes none then."""
        if count > self.num_free:
            raise OutOfPagesError
        return [self._steps.take(self.address) for _ in range(count)]

    def share(self, pages: Iterable[int]) -> None:
        """Count one more holder of each page."""
        for page in pages:
            if not (self._table[page, HOLDERS] or self._table[page, IS_CACHED]):
                raise ValueError(f"page {page} is free and cannot be shared")
            self._steps.share(self.address, page)

    def release(self, pages: Sequence[int]) -> None:
        """Count one holder less of each page. One that nobody holds is free, or evictable if it is in the prefix cache."""
        for page in reversed(pages):  # of a text the end is evicted first: nothing is found behind a gap
            if self._table[page, HOLDERS] == 0:
                raise ValueError(f"page {page} is released twice")
            self._steps.release(self.address, page)

    def lookup(self, key: bytes) -> int | None:
        """The page of the prefix cache with this key."""
        self._settle()
        return self._pages.get(key)

    def insert(self, key: bytes, page: int) -> None:
        """Put a page that is never written again, until it is free, into the prefix cache; where the key is new."""
        self._settle()
        if self._prefix_caching and key not in self._pages:
            self._pages[key] = page
            self._keys[page] = key
            self._table[page, IS_CACHED] = 1

    def key_of(self, page: int) -> bytes | None:
        """The page's key, if it is in the prefix cache."""
        self._settle()
        return self._keys.get(page)

    def _settle(self) -> None:
        """Strike off the keys of pages that were evicted."""
        if num_evicted := self._header[NUM_EVICTED]:
            for page in self._evicted[:num_evicted].tolist():
                del self._pages[self._keys.pop(page)]
            self._header[NUM_EVICTED] = 0

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the counts are exactly those of ``held``, the block tables of all holders."""
        self._settle()
        expected = [0] * self.num_pages
        expected[0] = 1
        for table in held:
            for page in table:
                expected[page] += 1
        assert expected == self._table[:, HOLDERS].tolist(), "page counts differ from the block tables"
        assert self._pages == {key: page for page, key in self._keys.items()}, "prefix cache"
        assert self._table[:, IS_CACHED].nonzero()[0].tolist() == sorted(self._keys), "pages of the prefix cache"
        unheld = [p for p, count in enumerate(expected) if count == 0]
        assert sorted(self.free_pages) == [p for p in unheld if p not in self._keys], "free list"
        evictable, page = [], int(self._header[OLDEST])
        while page != NONE:
            evictable.append(page)
            page = int(self._table[page, BEHIND])
        assert sorted(evictable) == [p for p in unheld if p in self._keys], "evictable pages"
        assert len(evictable) == self._header[NUM_EVICTABLE]
