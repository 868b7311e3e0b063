"""Pages of the draft's KV cache: who holds them, which text full ones hold, and when they are free again."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

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
    """

    def __init__(self, num_pages: int, prefix_caching: bool = True) -> None:
        if num_pages < 2:
            raise ValueError(f"the draft's KV cache needs at least 2 pages, not {num_pages}")
        self._prefix_caching = prefix_caching
        self._counts = [0] * num_pages
        self._counts[0] = 1
        self._free = list(range(num_pages - 1, 0, -1))
        self._pages: dict[bytes, int] = {}  # the prefix cache, by key
        self._keys: dict[int, bytes] = {}  # and by page
        self._evictable: OrderedDict[int, None] = OrderedDict()  # its pages that nobody holds, oldest first

    @property
    def num_free(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._evictable)

    @property
    def num_pages(self) -> int:
        return len(self._counts)

    def take(self, count: int) -> list[int]:
        """Pages of the caller's own. Raises OutOfPagesError, and takes none then."""
        if count > self.num_free:
            raise OutOfPagesError
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._counts[page] = 1
        return pages

    def _evict(self) -> int:
        page, _ = self._evictable.popitem(last=False)
        del self._pages[self._keys.pop(page)]
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Count one more holder of each page."""
        for page in pages:
            if self._counts[page] == 0:
                if page not in self._evictable:
                    raise ValueError(f"page {page} is free and cannot be shared")
                del self._evictable[page]
            self._counts[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Count one holder less of each page. One that nobody holds is free, or evictable if it is in the prefix cache."""
        for page in reversed(pages):  # of a text the end is evicted first: nothing is found behind a gap
            count = self._counts[page]
            if count == 0:
                raise ValueError(f"page {page} is released twice")
            self._counts[page] = count - 1
            if count == 1:
                if page in self._keys:
                    self._evictable[page] = None
                else:
                    self._free.append(page)

    def is_shared(self, page: int) -> bool:
        return self._counts[page] > 1

    def lookup(self, key: bytes) -> int | None:
        """The page of the prefix cache with this key."""
        return self._pages.get(key)

    def insert(self, key: bytes, page: int) -> None:
        """Put a page that is never written again, until it is free, into the prefix cache; where the key is new."""
        if self._prefix_caching and key not in self._pages:
            self._pages[key] = page
            self._keys[page] = key

    def key_of(self, page: int) -> bytes | None:
        """The page's key, if it is in the prefix cache."""
        return self._keys.get(page)

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the counts are exactly those of ``held``, the block tables of all holders."""
        expected = [0] * len(self._counts)
        expected[0] = 1
        for table in held:
            for page in table:
                expected[page] += 1
        assert expected == self._counts, "page counts differ from the block tables"
        assert self._pages == {key: page for page, key in self._keys.items()}, "prefix cache"
        unheld = [p for p, count in enumerate(expected) if count == 0]
        assert sorted(self._free) == [p for p in unheld if p not in self._keys], "free list"
        assert sorted(self._evictable) == [p for p in unheld if p in self._keys], "evictable pages"
