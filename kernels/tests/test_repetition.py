"""Races show as results that differ from run to run: every kernel many times, bit for bit.

Under the interpreter, which runs one program after the other, there are none to be found; there two runs check that nothing
depends on what the memory held before. `make test-gpu` runs this file under compute-sanitizer, too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from double_kernels import Noise, Support
from double_kernels.triton_fork_pages import fork_pages_triton
from double_kernels.triton_noise import sample_with_noise_triton
from double_kernels.triton_top_branches import top_branches_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
NUM_RUNS = 100 if ON_GPU else 2


def forked(generator: torch.Generator) -> Callable[[], list[torch.Tensor]]:
    num_pages = 64 if ON_GPU else 8
    start = torch.randint(-128, 128, (num_pages, 2, 16, 4, 64), dtype=torch.int8, generator=generator).to(DEVICE)
    triples = [(page, num_pages // 2 + page, 1 + 5 * page % 16) for page in range(num_pages // 2)]

    def run() -> list[torch.Tensor]:
        cache = start.clone()
        fork_pages_triton([cache[:, 0], cache[:, 1]], triples, slot_dim=1)
        return [cache]

    return run


def branches(generator: torch.Generator) -> Callable[[], list[torch.Tensor]]:
    num_rows, vocab_size = (64, 151_936) if ON_GPU else (2, 9_000)
    # Few values, many ties: what is taken depends on every comparison.
    logits = torch.randint(-9, 9, (num_rows, vocab_size), generator=generator).bfloat16().to(DEVICE)
    temperatures = (torch.rand(num_rows, generator=generator) + 0.5).to(DEVICE)
    return lambda: list(top_branches_triton(logits, 32, temperatures))


def noisy_branches(generator: torch.Generator) -> Callable[[], list[torch.Tensor]]:
    num_rows, vocab_size = (64, 151_936) if ON_GPU else (2, 9_000)
    logits = torch.randint(-9, 9, (num_rows, vocab_size), generator=generator).float().to(DEVICE)
    row = torch.arange(num_rows, device=DEVICE)
    noise = Noise(row, row, (row % 2).float())
    support = Support(row.int() % 50, 1 - row / 100, torch.zeros(num_rows, device=DEVICE))
    return lambda: [*top_branches_triton(logits, 32, None, noise, support), sample_with_noise_triton(logits, row, row)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("make", [forked, branches, noisy_branches])
def test_results_are_the_same_from_run_to_run(make: Callable[[torch.Generator], Callable[[], list[torch.Tensor]]]) -> None:
    run = make(torch.Generator().manual_seed(0))
    first = run()
    for _ in range(NUM_RUNS - 1):
        for expected, found in zip(first, run(), strict=True):
            # The same bits, not the same numbers: a NaN may not hide a difference.
            assert torch.equal(expected.contiguous().view(torch.int8), found.contiguous().view(torch.int8))
