"""Copies of the used slots of key/value pages, for branches that go separate ways from a shared tail page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["fork_pages", "fork_pages_reference"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fork_pages(
    caches: Sequence[torch.Tensor],
    triples: Sequence[tuple[int, int, int]],
    *,
    page_size: int,
    slot_dim: int | None,
) -> None:
    """Copy slots 0 .. used - 1 of each (source page, destination page, used slots) triple, in every cache.

    caches: views of the key/value cache, any dtype, device and strides, pages in dimension 0. One per layer,
        two (keys, values) per layer, or one with the layers as an inner dimension, as the layout allows.
    triples: destinations are distinct and are no source of the same call, so the order does not matter.
    page_size: slots in a page; 0 <= used <= page_size. Nothing is copied if used is 0.
    slot_dim: the dimension whose length is page_size and which counts the slots of a page. None if the
        layout inside a page is the attention kernel's own business (vLLM's CPU kernels keep keys transposed,
        or in tiles): then whole pages are copied, and slots behind the used ones of a destination are
        undefined.

    Raises ValueError for a page or a count out of range, destinations that clash, or caches of different
    sizes.

    On a GPU the kernel of triton_fork_pages does it, in the order of the current stream, and nothing waits for it. On a CPU the
    reference does.
    """
    if not triples:
        return
    num_pages = _check(caches, page_size, slot_dim)
    sources = [source for source, _, _ in triples]
    destinations = [destination for _, destination, _ in triples]
    if min(*sources, *destinations) < 0 or max(*sources, *destinations) >= num_pages:
        raise ValueError(f"a copy names a page outside 0..{num_pages - 1}")
    if len({*destinations}) != len(destinations) or not {*sources}.isdisjoint(destinations):
        raise ValueError("destinations of a copy must be distinct and no source of the same call")
    for _, _, used in triples:
        if not 0 <= used <= page_size:
            raise ValueError(f"copy of {used} slots, a page has {page_size}")

    if caches[0].is_cuda:
        from double_kernels.triton_fork_pages import fork_pages_triton  # here: a CPU needs no triton

        fork_pages_triton(caches, triples, slot_dim=slot_dim)
    else:
        fork_pages_reference(caches, triples, slot_dim=slot_dim)


def fork_pages_reference(
    caches: Sequence[torch.Tensor], triples: Sequence[tuple[int, int, int]], *, slot_dim: int | None
) -> None:
    """`fork_pages` without a kernel, on any device; its arguments are not checked.

    On a CPU it copies in numpy, on views of the caches: of a page or a few slots an operator of torch is mostly dispatch.
    """
    views: list[Any] = []
    for cache in caches:
        views += [cache] if cache.is_cuda else _in_numpy(cache, slot_dim)
    for source, destination, used in triples:
        if used == 0:
            continue
        for view in views:
            kept = view if slot_dim is None else view[(slice(None),) * slot_dim + (slice(used),)]
            kept[destination] = kept[source]


def _in_numpy(cache: torch.Tensor, slot_dim: int | None) -> list[npt.NDArray[Any]]:
    # As integers, since numpy knows neither bfloat16 nor float8. It knows whatever has 16 bytes.
    integer = _INTEGERS.get(cache.element_size())
    view = (cache if integer is None else cache.view(integer)).numpy()
    if view.strides[-1] <= view.strides[0] or slot_dim == view.ndim - 1:
        return [view]
    # Between a page's layers lie other pages: numpy would suspect that two pages overlap, and copy twice.
    return [view[..., layer] for layer in range(view.shape[-1])]


def _check(caches: Sequence[torch.Tensor], page_size: int, slot_dim: int | None) -> int:
    """Number of pages, after a look at the caches' shapes."""
    if not caches:
        raise ValueError("there is no cache to copy in")
    num_pages = caches[0].shape[0]
    for cache in caches:
        if cache.shape[0] != num_pages:
            raise ValueError(f"caches have {num_pages} and {cache.shape[0]} pages")
        if cache.device != caches[0].device:
            raise ValueError(f"caches lie on {caches[0].device} and {cache.device}")
        if slot_dim is not None:
            if not 1 <= slot_dim < cache.ndim:
                raise ValueError(f"slot_dim is {slot_dim}, a cache has {cache.ndim} dimensions, the first for pages")
            if cache.shape[slot_dim] != page_size:
                raise ValueError(f"dimension {slot_dim} has {cache.shape[slot_dim]} slots, a page has {page_size}")
    return num_pages
