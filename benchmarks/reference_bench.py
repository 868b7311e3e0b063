"""The draft's own operations on a CPU, where their references are production code: one iteration of some paths.

    python -m benchmarks.reference_bench

Rows of results/references.csv: quantiles in microseconds of each op, with the shapes of the bundled draft (2 layers, 4 heads of
32, float32, pages of 32 slots, 3,072 tokens), on one thread. Every path is one token; ``forks``: how many leave a shared page.
Logits are others on every call: a processor learns by heart how a few branch, and a search in them then takes half its time.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from double_kernels.fork_pages import fork_pages
from double_kernels.top_branches import top_branches

from benchmarks import rows
from benchmarks.stats import quantile

__all__ = ["main"]

VOCAB, CHILDREN, PAGE_SIZE, NUM_PAGES = 3072, 32, 32, 1024
FRESH_SCORES = 1 << 19  # of the logits that take turns: too many to be learned, few enough for a cache


def ops(paths: int, forks: int) -> dict[str, Callable[[], object]]:
    """The calls of one iteration with ``paths`` paths."""
    generator = torch.Generator().manual_seed(0)
    # As the draft has them on a CPU: one view, layers last, which in memory come first.
    caches = [torch.rand(2, NUM_PAGES, 4, PAGE_SIZE, 64, generator=generator).permute(1, 2, 3, 4, 0)]
    triples = [(index, paths + index, 1 + index % PAGE_SIZE) for index in range(forks)]
    count = max(1, FRESH_SCORES // (paths * VOCAB))
    logits = itertools.cycle([4 * torch.randn(paths, VOCAB, generator=generator) for _ in range(count)])
    return {
        "fork_pages": lambda: fork_pages(caches, triples, page_size=PAGE_SIZE, slot_dim=None),
        "top_branches": lambda: top_branches(next(logits), CHILDREN),
    }


def measure(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call, after some that are not counted."""
    seconds = []
    for number in range(repeats + 50):
        started = time.perf_counter()
        run()
        if number >= 50:
            seconds.append(time.perf_counter() - started)
    return seconds


@torch.inference_mode()
def main() -> None:
    """Appends a row per op and number of paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "references.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for paths, forks in ((1, 1), (16, 4), (256, 64)):
        for name, run in ops(paths, forks).items():
            seconds = measure(run, options.repeats)
            row: dict[str, rows.Value] = {"op": name, "paths": paths, "forks": forks if name == "fork_pages" else None}
            row |= {f"p{int(100 * q)}_us": 1e6 * quantile(seconds, q) for q in (0.2, 0.5, 0.8, 0.99)}
            print(row, flush=True)
            rows.append(options.output, row | {"repeats": options.repeats} | rows.provenance("benchmarks.reference_bench"))


if __name__ == "__main__":
    main()
