from collections.abc import Sequence

import pytest
import torch
from double_kernels import fork_pages

NUM_PAGES = 9
TRIPLES = [(1, 8, 5), (1, 0, 1), (3, 2, 0), (4, 7, 7)]


def slow_fork_pages(
    caches: Sequence[torch.Tensor], triples: Sequence[tuple[int, int, int]], slot_dim: int
) -> list[torch.Tensor]:
    """One slot after the other, into copies."""
    copies = [cache.clone() for cache in caches]
    for cache, copied in zip(caches, copies, strict=True):
        for source, destination, used in triples:
            for slot in range(used):
                copied[destination].select(slot_dim - 1, slot).copy_(cache[source].select(slot_dim - 1, slot))
    return copies


def _filled(shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A cache of this shape whose memory has its dimensions in `order`, every element another value."""
    memory = torch.arange(torch.Size(shape).numel()).to(dtype).view([shape[dim] for dim in order])
    return memory.permute([order.index(dim) for dim in range(len(shape))])


LAYOUTS = [
    pytest.param((NUM_PAGES, 3, 7, 10), (0, 1, 2, 3), 2, id="P9-H3-S7-C10"),
    pytest.param((NUM_PAGES, 3, 7, 10), (0, 2, 1, 3), 2, id="P9-H3-S7-C10-slots-outside-heads"),
    pytest.param((NUM_PAGES, 3, 7, 10), (1, 0, 2, 3), 2, id="P9-H3-S7-C10-heads-outside-pages"),
    pytest.param((NUM_PAGES, 1, 5, 7), (0, 1, 2, 3), 3, id="P9-H1-D5-S7-keys-transposed"),
    pytest.param((NUM_PAGES, 2, 7, 3, 4), (4, 0, 1, 2, 3), 2, id="P9-H2-S7-C3-L4-layers-outermost"),
    pytest.param((NUM_PAGES, 7), (1, 0), 1, id="P9-S7"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(("shape", "order", "slot_dim"), LAYOUTS)
def test_fork_copies_other_slots_than_the_used(
    shape: tuple[int, ...], order: tuple[int, ...], slot_dim: int, dtype: torch.dtype
) -> None:
    caches = [_filled(shape, order, dtype), -_filled(shape, order, dtype)]
    expected = slow_fork_pages(caches, TRIPLES, slot_dim)
    fork_pages(caches, TRIPLES, page_size=7, slot_dim=slot_dim)
    for cache, wanted in zip(caches, expected, strict=True):
        assert torch.equal(cache, wanted)


@pytest.mark.parametrize(("shape", "order", "slot_dim"), LAYOUTS)
def test_hidden_layout_loses_used_slots_or_touches_other_pages(
    shape: tuple[int, ...], order: tuple[int, ...], slot_dim: int
) -> None:
    cache = _filled(shape, order, torch.float32)
    expected = slow_fork_pages([cache], [(s, d, 7 if used else 0) for s, d, used in TRIPLES], slot_dim)
    fork_pages([cache], TRIPLES, page_size=7, slot_dim=None)
    assert torch.equal(cache, expected[0])


def test_poison_behind_the_used_slots_is_copied() -> None:
    cache = torch.zeros(3, 2, 7, 4)
    cache[0, :, 3:] = torch.nan
    fork_pages([cache], [(0, 2, 3)], page_size=7, slot_dim=2)
    assert not cache[2].isnan().any()


def test_memory_between_pages_is_touched() -> None:
    backing = torch.full((4, 3, 7, 9), torch.nan)
    cache = backing[:, :, :, :5]
    cache.copy_(torch.rand(4, 3, 7, 5))
    fork_pages([cache], [(0, 3, 6)], page_size=7, slot_dim=2)
    assert torch.equal(cache[3, :, :6], cache[0, :, :6])
    assert backing[:, :, :, 5:].isnan().all()


def test_no_triples_fail() -> None:
    cache = torch.ones(3, 7)
    fork_pages([cache], [], page_size=7, slot_dim=1)
    assert torch.equal(cache, torch.ones(3, 7))


@pytest.mark.parametrize(
    ("shapes", "triples", "slot_dim"),
    [
        pytest.param([(4, 7)], [(0, 4, 1)], 1, id="destination-out-of-range"),
        pytest.param([(4, 7)], [(-1, 2, 1)], 1, id="negative-source"),
        pytest.param([(4, 7)], [(0, 1, 8)], 1, id="more-slots-than-a-page"),
        pytest.param([(4, 7)], [(0, 1, -1)], 1, id="negative-count"),
        pytest.param([(4, 7)], [(0, 1, 1), (2, 1, 1)], 1, id="destination-twice"),
        pytest.param([(4, 7)], [(0, 1, 1), (1, 2, 1)], 1, id="destination-is-a-source"),
        pytest.param([(4, 7)], [(2, 2, 1)], 1, id="onto-itself"),
        pytest.param([(4, 7), (5, 7)], [(0, 1, 1)], 1, id="caches-of-other-sizes"),
        pytest.param([(4, 6)], [(0, 1, 1)], 1, id="slots-elsewhere"),
        pytest.param([(7, 7)], [(0, 1, 1)], 0, id="slots-are-pages"),
        pytest.param([], [(0, 1, 1)], 1, id="no-caches"),
    ],
)
def test_wrong_arguments_copy_something(
    shapes: list[tuple[int, ...]], triples: list[tuple[int, int, int]], slot_dim: int
) -> None:
    caches = [torch.rand(shape) for shape in shapes]
    before = [cache.clone() for cache in caches]
    with pytest.raises(ValueError, match=r"cop|cache|slot"):
        fork_pages(caches, triples, page_size=7, slot_dim=slot_dim)
    assert all(torch.equal(cache, old) for cache, old in zip(caches, before, strict=True))
