"""Pages of the draft's KV cache: who holds them, which text full ones hold, and when they are free again."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from vllm_double.draft.arena import NONE, PAGE, TOTALS, Records
from vllm_double.jit import view_part

__all__ = ["PagePool", "num_available", "page_key", "partition_key", "release_page", "share_page", "take_page"]


def partition_key(tenant: str | None, epoch: int) -> bytes:
    """What the keys of a tenant's pages begin with in an epoch of the cache, 16 bytes: no other partition's pages are found.

    If tenants shared pages, one would get its drafts sooner for what another sent, and would learn it so. Requests that name no
    tenant share theirs, as they do in vLLM's own prefix cache, which reveals as much.
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
    nobody holds it, it stays until a page is needed; the one that was released first is evicted first.

    Nothing is dropped at once when the cache is reset: nobody asks for pages of an older epoch, and they are evicted in time.
    ``prefix_caching``: False keeps no page.

    Compiled functions take and release pages in ``pages`` and ``totals``. Only the keys are here: those of evicted pages are
    noticed when somebody looks for them.
    """

    def __init__(self, num_pages: int, prefix_caching: bool = True) -> None:
        if num_pages < 2:
            raise ValueError(f"the draft's KV cache needs at least 2 pages, not {num_pages}")
        self._prefix_caching = prefix_caching
        self.pages = np.zeros(num_pages, PAGE)
        self.pages["next"] = [NONE, *range(2, num_pages), NONE]
        self.pages["holders"][0] = 1
        self.totals = np.zeros(1, TOTALS)
        self.totals["free_page"], self.totals["num_free_pages"] = 1, num_pages - 1
        self.totals["oldest_page"] = self.totals["newest_page"] = NONE
        self._pages: dict[bytes, int] = {}  # the prefix cache, by key
        self._keys: dict[int, bytes] = {}  # and by page; in both are evicted pages, too

    @property
    def num_free(self) -> int:
        """Pages that can be taken."""
        return int(self.totals["num_free_pages"][0] + self.totals["num_evictable"][0])

    def lookup(self, key: bytes) -> int | None:
        """The page of the prefix cache with this key."""
        page = self._pages.get(key)
        return page if page is not None and self.pages["is_cached"][page] else None

    def insert(self, key: bytes, page: int) -> None:
        """Put a page that is never written again, until it is free, into the prefix cache, if the key is new."""
        if not self._prefix_caching or self.lookup(key) is not None:
            return
        if (before := self._keys.get(page)) is not None and self._pages.get(before) == page:
            del self._pages[before]
        self._pages[key] = page
        self._keys[page] = key
        self.pages["is_cached"][page] = True


@view_part
def num_available(totals: Records) -> int:
    """Pages that `take_page` can give."""
    return totals[0].num_free_pages + totals[0].num_evictable  # type: ignore[no-any-return]


@view_part
def take_page(pages: Records, totals: Records) -> int:
    """A page of the caller's own; there must be one. If none is free, the oldest one of the prefix cache is evicted."""
    if totals[0].num_free_pages > 0:
        page = totals[0].free_page
        totals[0].free_page = pages[page].next
        totals[0].num_free_pages -= 1
    else:
        page = totals[0].oldest_page
        _unlink(pages, totals, page)
        pages[page].is_cached = False
    pages[page].holders = 1
    return page  # type: ignore[no-any-return]


@view_part
def share_page(pages: Records, totals: Records, page: int) -> None:
    """Count one more holder of a page that is held or in the prefix cache."""
    if pages[page].holders == 0:
        _unlink(pages, totals, page)
    pages[page].holders += 1


@view_part
def release_page(pages: Records, totals: Records, page: int) -> None:
    """Count one holder less. A page that nobody holds is free, or may be evicted if it is in the prefix cache."""
    pages[page].holders -= 1
    if pages[page].holders > 0:
        return
    if not pages[page].is_cached:
        pages[page].next = totals[0].free_page
        totals[0].free_page = page
        totals[0].num_free_pages += 1
        return
    newest = totals[0].newest_page
    pages[page].before, pages[page].next = newest, NONE
    if newest == NONE:
        totals[0].oldest_page = page
    else:
        pages[newest].next = page
    totals[0].newest_page = page
    totals[0].num_evictable += 1


@view_part
def _unlink(pages: Records, totals: Records, page: int) -> None:
    """Take a page out of the list of those that may be evicted."""
    before, behind = pages[page].before, pages[page].next
    if before == NONE:
        totals[0].oldest_page = behind
    else:
        pages[before].next = behind
    if behind == NONE:
        totals[0].newest_page = before
    else:
        pages[behind].before = before
    totals[0].num_evictable -= 1
