"""Pages of the draft's KV cache: who holds them, and when they are free again."""

from collections.abc import Iterable, Sequence

__all__ = ["OutOfPagesError", "PagePool"]


class OutOfPagesError(Exception):
    """No free page is left; the caller drafts less or lets an idle request go."""


class PagePool:
    """Reference counts for ``num_pages`` pages. Page 0 is never handed out: vLLM's kernels may write padding there."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"the draft's KV cache needs at least 2 pages, not {num_pages}")
        self._counts = [0] * num_pages
        self._counts[0] = 1
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_pages(self) -> int:
        return len(self._counts)

    def take(self, count: int) -> list[int]:
        """Pages of the caller's own. Raises OutOfPagesError, and takes none then."""
        if count > len(self._free):
            raise OutOfPagesError
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Count one more holder of each page."""
        for page in pages:
            if self._counts[page] == 0:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Count one holder less of each page; a page that nobody holds is free."""
        for page in pages:
            count = self._counts[page]
            if count == 0:
                raise ValueError(f"page {page} is released twice")
            self._counts[page] = count - 1
            if count == 1:
                self._free.append(page)

    def is_shared(self, page: int) -> bool:
        return self._counts[page] > 1

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the counts are exactly those of ``held``, the block tables of all holders."""
        expected = [0] * len(self._counts)
        expected[0] = 1
        for table in held:
            for page in table:
                expected[page] += 1
        assert expected == self._counts, "page counts differ from the block tables"
        assert sorted(self._free) == [p for p, count in enumerate(expected) if count == 0], "free list"
