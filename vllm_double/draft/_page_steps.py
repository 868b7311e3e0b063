"""Steps of the page pool: compiled functions on the arrays that `pages` describes."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from vllm_double.jit import of_numbers, part, pointer

Ints = npt.NDArray[np.int32]
Header = npt.NDArray[np.int64]

# Entries of a pool's header.
NUM_PAGES, NUM_FREE, NUM_EVICTABLE, NUM_EVICTED, OLDEST, NEWEST, PAGES_AT, FREE_AT, EVICTED_AT = range(9)
HEADER_LENGTH = EVICTED_AT + 1
# Columns of a page. Pages of the prefix cache that nobody holds are a list, the one that was released first at its head.
HOLDERS, IS_CACHED, BEFORE, BEHIND = range(4)
NONE = -1


@part
def _pages(pool: Header) -> Ints:
    return numba.carray(pointer(pool[PAGES_AT]), (pool[NUM_PAGES], 4), np.int32)  # type: ignore[no-any-return]


@part
def header_at(address: int, length: int) -> Header:
    """The int64 array at an address."""
    return numba.carray(pointer(address), (length,), np.int64)  # type: ignore[no-any-return]


@part
def num_available(pool: Header) -> int:
    """Pages that `take_page` can give."""
    return pool[NUM_FREE] + pool[NUM_EVICTABLE]  # type: ignore[no-any-return]


@part
def num_holders(pool: Header, page: int) -> int:
    return _pages(pool)[page, HOLDERS]  # type: ignore[no-any-return]


@part
def _unlink(pool: Header, pages: Ints, page: int) -> None:
    """Take a page out of the list of those that may be evicted."""
    before, behind = pages[page, BEFORE], pages[page, BEHIND]
    if before == NONE:
        pool[OLDEST] = behind
    else:
        pages[before, BEHIND] = behind
    if behind == NONE:
        pool[NEWEST] = before
    else:
        pages[behind, BEFORE] = before
    pool[NUM_EVICTABLE] -= 1


@part
def take_page(pool: Header) -> int:
    """A page of the caller's own; there must be one. What is evicted for it is noted in the list of evicted pages."""
    pages = _pages(pool)
    if pool[NUM_FREE] > 0:
        pool[NUM_FREE] -= 1
        page = numba.carray(pointer(pool[FREE_AT]), (pool[NUM_PAGES],), np.int32)[pool[NUM_FREE]]
    else:
        page = np.int32(pool[OLDEST])
        _unlink(pool, pages, page)  # type: ignore[arg-type]
        pages[page, IS_CACHED] = 0
        numba.carray(pointer(pool[EVICTED_AT]), (pool[NUM_PAGES],), np.int32)[pool[NUM_EVICTED]] = page
        pool[NUM_EVICTED] += 1
    pages[page, HOLDERS] = 1
    return page  # type: ignore[no-any-return]


@part
def share_page(pool: Header, page: int) -> None:
    """Count one more holder of a page that is held or in the prefix cache."""
    pages = _pages(pool)
    if pages[page, HOLDERS] == 0:
        _unlink(pool, pages, page)
    pages[page, HOLDERS] += 1


@part
def release_page(pool: Header, page: int) -> None:
    """Count one holder less. A page that nobody holds is free, or may be evicted if it is in the prefix cache."""
    pages = _pages(pool)
    pages[page, HOLDERS] -= 1
    if pages[page, HOLDERS] > 0:
        return
    if pages[page, IS_CACHED]:
        newest = pool[NEWEST]
        pages[page, BEFORE], pages[page, BEHIND] = newest, NONE
        if newest == NONE:
            pool[OLDEST] = page
        else:
            pages[newest, BEHIND] = page
        pool[NEWEST] = page
        pool[NUM_EVICTABLE] += 1
    else:
        numba.carray(pointer(pool[FREE_AT]), (pool[NUM_PAGES],), np.int32)[pool[NUM_FREE]] = page
        pool[NUM_FREE] += 1


def _take(pool_at: int) -> int:
    return take_page(header_at(pool_at, HEADER_LENGTH))


def _share(pool_at: int, page: int) -> None:
    share_page(header_at(pool_at, HEADER_LENGTH), page)


def _release(pool_at: int, page: int) -> None:
    release_page(header_at(pool_at, HEADER_LENGTH), page)


class Steps(NamedTuple):
    take: Callable[[int], int]
    share: Callable[[int, int], None]
    release: Callable[[int, int], None]


@functools.cache
def steps() -> Steps:
    """The compiled functions; compiles them, or loads what an earlier process compiled, once."""
    return Steps(of_numbers(_take, 1, "int64"), of_numbers(_share, 2, "void"), of_numbers(_release, 2, "void"))
