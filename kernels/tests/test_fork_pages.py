from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from double_kernels import fork_pages
from double_kernels.fork_pages import fork_pages_reference
from double_kernels.triton_fork_pages import fork_pages_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_PAGES = 6
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
Fork = Callable[..., None]
FORKS = [pytest.param(fork_pages_reference, id="reference"), pytest.param(fork_pages_triton, id="kernel")]
Triples = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Layout:
    """Caches of one shape and strides, in elements, at some offsets in one piece of memory; pages in dimension 0."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    slot_dim: int
    offsets: tuple[int, ...] = field(default=(0,))

    @property
    def page_size(self) -> int:
        return self.shape[self.slot_dim]

    @property
    def num_elements(self) -> int:
        return 5 + max(self.offsets) + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)) + 1

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        return [memory.as_strided(self.shape, self.strides, offset) for offset in self.offsets]

    def triples(self) -> Triples:
        """Ragged: a full page, part of one, a single slot, nothing."""
        size = self.page_size
        return [(1, 5, size), (1, 0, max(1, size - 2)), (4, 2, 1), (4, 3, 0)]


def dense(*sizes: int) -> tuple[int, ...]:
    """Strides of contiguous memory."""
    return tuple(int(np.prod(sizes[dim + 1 :])) for dim in range(len(sizes)))


P = NUM_PAGES
LAYOUTS = {
    "flash-P6-S4-H2-D64": Layout((P, 4, 2, 64), (2 * 512, 128, 64, 1), 1, (0, 512)),
    "flash-kv-first-P6-S7-H3-D10": Layout((P, 7, 3, 10), dense(P, 7, 3, 10), 1, (0, P * 210)),
    "flash-one-view-P6-S5-H3-D16": Layout((P, 2, 5, 3, 16), dense(P, 2, 5, 3, 16), 2),
    "heads-outside-slots-P6-H3-S7-D16": Layout((P, 3, 7, 16), dense(P, 3, 7, 16), 2),
    "heads-outside-pages-P6-H3-S7-D10": Layout((P, 3, 7, 10), (70, P * 70, 10, 1), 2),
    "layers-outermost-P6-H2-S4-C12-L3": Layout((P, 2, 4, 12, 3), (96, 48, 12, 1, P * 96), 2),
    "layers-innermost-P6-H2-S4-C3-L5": Layout((P, 2, 4, 3, 5), dense(P, 2, 4, 3, 5), 2),
    "keys-transposed-P6-H2-D5-S7": Layout((P, 2, 5, 7), dense(P, 2, 5, 7), 3),
    "latent-P6-S4-D576": Layout((P, 4, 576), dense(P, 4, 576), 1),
    "one-head-P6-S1-H1-D63": Layout((P, 1, 1, 63), dense(P, 1, 1, 63), 1),
    "odd-gaps-P6-S3-H2-D9": Layout((P, 3, 2, 9), (263, 41, 17, 1), 1, (3, 134)),
    "wide-P6-S2-D1101": Layout((P, 2, 1101), (2203, 1101, 1), 1),
    "every-second-P6-S3-D8": Layout((P, 3, 8), (60, 17, 2), 1),
    "five-dimensions-P6-A2-B3-S3-C2-D2-E3": Layout((P, 2, 3, 3, 2, 2, 3), (999, 490, 160, 50, 23, 11, 1), 3),
    "slots-only-P6-S7": Layout((P, 7), (1, P), 1),
}
layouts = pytest.mark.parametrize("layout", [pytest.param(layout, id=name) for name, layout in LAYOUTS.items()])


@layouts
def test_caches_share_no_element(layout: Layout) -> None:
    """What two of them have in common a device may copy in any order."""
    places = torch.cat([view.flatten() for view in layout.views(torch.arange(layout.num_elements))])
    assert len(places.unique()) == len(places)


def slow_fork(caches: Sequence[torch.Tensor], triples: Triples, slot_dim: int) -> None:
    """One slot after the other."""
    for cache in caches:
        for source, destination, used in triples:
            for slot in range(used):
                cache[destination].select(slot_dim - 1, slot).copy_(cache[source].select(slot_dim - 1, slot))


def random_memory(layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """Any bytes, NaN of every kind among them."""
    generator = torch.Generator().manual_seed(0)
    num_bytes = layout.num_elements * dtype.itemsize
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).to(DEVICE)


def check(fork: Fork, layout: Layout, dtype: torch.dtype, triples: Triples, slot_dim: int | None) -> None:
    """Every byte of the memory is as after the slow twin, those between and behind the caches too."""
    memory = random_memory(layout, dtype)
    expected = memory.view(INTEGERS[dtype.itemsize]).cpu()
    if slot_dim is None:
        whole = [(source, destination, layout.page_size if used else 0) for source, destination, used in triples]
        slow_fork(layout.views(expected), whole, layout.slot_dim)
    else:
        slow_fork(layout.views(expected), triples, layout.slot_dim)
    fork(layout.views(memory), triples, slot_dim=slot_dim)
    assert torch.equal(memory.view(expected.dtype).cpu(), expected)


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@layouts
def test_fork_copies_the_used_slots_alone(fork: Fork, layout: Layout, dtype: torch.dtype) -> None:
    check(fork, layout, dtype, layout.triples(), layout.slot_dim)


@pytest.mark.parametrize("fork", FORKS)
@layouts
def test_of_a_hidden_layout_whole_pages_are_copied(fork: Fork, layout: Layout) -> None:
    check(fork, layout, torch.bfloat16, layout.triples(), None)


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("triples", [[], [(0, 1, 0), (2, 3, 0)]], ids=["no-triples", "nothing-used"])
def test_empty_copies_write_nothing(fork: Fork, triples: Triples) -> None:
    layout = LAYOUTS["flash-P6-S4-H2-D64"]
    check(fork, layout, torch.bfloat16, triples, layout.slot_dim)


@pytest.mark.parametrize("fork", FORKS)
def test_caches_of_different_layouts_are_kept_apart(fork: Fork) -> None:
    chosen = [LAYOUTS["flash-P6-S4-H2-D64"], LAYOUTS["latent-P6-S4-D576"]]
    kinds = [(layout, dtype) for layout in chosen for dtype in (torch.bfloat16, torch.float32)]
    memories = [random_memory(layout, dtype) for layout, dtype in kinds]
    expected = [memory.view(INTEGERS[memory.element_size()]).cpu() for memory in memories]
    triples = [(1, 5, 4), (1, 0, 3), (4, 2, 1)]
    for (layout, _), memory in zip(kinds, expected, strict=True):
        slow_fork(layout.views(memory), triples, slot_dim=1)
    caches = [view for (layout, _), memory in zip(kinds, memories, strict=True) for view in layout.views(memory)]
    fork(caches, triples, slot_dim=1)
    for memory, wanted in zip(memories, expected, strict=True):
        assert torch.equal(memory.view(wanted.dtype).cpu(), wanted)


@pytest.mark.parametrize("fork", FORKS)
def test_offsets_are_wider_than_int32(fork: Fork) -> None:
    """The second page begins 2 ** 31 elements behind the first; memory that nobody touches takes none."""
    stride, length = (1 << 31) + 3, 3 * 11
    num_bytes = stride + length + 64
    memory = torch.empty(num_bytes, dtype=torch.int8, device="cuda") if DEVICE == "cuda" else None
    if memory is None:
        memory = torch.from_numpy(np.empty(num_bytes, dtype=np.int8))
    used = torch.arange(1, length + 1, dtype=torch.int8, device=DEVICE)
    memory[:length] = used
    memory[stride - 64 :] = 77
    fork([memory.as_strided((2, 3, 11), (stride, 11, 1))], [(0, 1, 2)], slot_dim=1)
    assert torch.equal(memory[stride : stride + 22], used[:22])
    assert bool((memory[stride - 64 : stride] == 77).all() and (memory[stride + 22 :] == 77).all())
    assert torch.equal(memory[:length], used)


def test_the_reference_takes_elements_of_sixteen_bytes() -> None:
    cache = torch.complex(torch.rand(3, 4, device=DEVICE).double(), torch.rand(3, 4, device=DEVICE).double())
    before = cache.clone()
    fork_pages_reference([cache], [(0, 1, 2)], slot_dim=1)
    assert torch.equal(cache[1], torch.cat([before[0, :2], before[1, 2:]]))
    assert torch.equal(cache[::2], before[::2])


def test_elements_of_sixteen_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        fork_pages_triton([torch.zeros(3, 4, dtype=torch.complex128, device=DEVICE)], [(0, 1, 2)], slot_dim=1)


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
def test_wrong_arguments_copy_nothing(
    shapes: list[tuple[int, ...]], triples: list[tuple[int, int, int]], slot_dim: int
) -> None:
    caches = [torch.rand(shape, device=DEVICE) for shape in shapes]
    before = [cache.clone() for cache in caches]
    with pytest.raises(ValueError, match=r"cop|cache|slot"):
        fork_pages(caches, triples, page_size=7, slot_dim=slot_dim)
    assert all(torch.equal(cache, old) for cache, old in zip(caches, before, strict=True))
