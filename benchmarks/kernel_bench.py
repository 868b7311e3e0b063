"""The kernels on a GPU: each beside its reference, the best composition of torch's own operators, and what the device can do.

    make bench-gpu

Rows of results/kernels.csv: quantiles of an op's time on the device in microseconds, with cold caches, from before its first
launch to behind its last; the host's time for the call; the limit, measured in the same run: a copy of as many bytes by torch,
one read of the logits. Does not run without a GPU, or while an op and its reference differ.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from benchmarks import rows
from benchmarks.stats import quantile

__all__ = ["main"]

Run = Callable[[], object]
_FLUSH_BYTES = 256 << 20  # more than any second-level cache
_CYCLES_PER_SECOND = 2e9  # of the device, and no fewer: it waits while the host launches
_MAX_SECONDS = 5.0  # for the repeats of one run; references launch thousands of copies


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    runs: what is measured, by name: "kernel", "reference", and "torch", the best composition of its operators.
    limit, best: what the limit is, and the runs of which the fastest is the limit.
    """

    op: str
    shape: str
    runs: Mapping[str, Run]
    limit: str
    best: Sequence[Run]
    num_bytes: int


def device_seconds(run: Run, repeats: int) -> list[float]:
    """Time of each run on the device, behind a write that empties the caches; the host has launched it all before it begins."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    head_start = int(2 * host_seconds(run, 5) * _CYCLES_PER_SECOND)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, stop in events:
        flush.zero_()
        torch.cuda._sleep(head_start)
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def host_seconds(run: Run, repeats: int) -> float:
    """Median time until a call returns, with nothing before it on the device."""
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def fork_case(megabytes: int, used: int) -> Case:
    """32 layers of vLLM's FlashAttention layout, 8 heads of 128 in bfloat16: 2 MB are forked with each page of 16 slots."""
    from double_kernels.fork_pages import fork_pages_reference
    from double_kernels.triton_fork_pages import fork_pages_triton

    page_size, num_layers, num_copies = 16, 32, max(1, megabytes // 2)
    shape = (2 * num_copies, 2, page_size, 8, 128)
    layers = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(num_layers)]
    caches = [layer[:, part] for layer in layers for part in (0, 1)]
    order = torch.randperm(2 * num_copies, generator=torch.Generator().manual_seed(0)).tolist()
    triples = [(order[2 * index], order[2 * index + 1], used) for index in range(num_copies)]
    sources = torch.tensor([source for source, _, _ in triples], device="cuda")
    destinations = torch.tensor([destination for _, destination, _ in triples], device="cuda")

    def composed() -> None:
        for layer in layers:
            layer[destinations, :, :used] = layer[sources, :, :used]

    num_bytes = num_copies * num_layers * layers[0][0, :, :used].nbytes
    source, destination = (torch.empty(num_bytes, dtype=torch.int8, device="cuda") for _ in range(2))

    def forget() -> None:
        for layer in layers:
            layer[destinations] = 0

    runs = {
        "kernel": lambda: fork_pages_triton(caches, triples, slot_dim=1),
        "reference": lambda: fork_pages_reference(caches, triples, slot_dim=1),
        "torch": composed,
    }
    states = []
    for run in runs.values():
        forget()
        run()
        states.append([layer[destinations] for layer in layers])
    if not all(torch.equal(a, b) for other in states[1:] for a, b in zip(states[0], other, strict=True)):
        raise _DifferenceError("fork_pages, its reference and torch's operators differ")
    copy = [lambda: destination.copy_(source)]
    return Case(
        "fork_pages", f"{megabytes}MB-P16-used{used}-L32-H8-D128-bfloat16", runs, "copy of as many bytes", copy, num_bytes
    )


def branches_case(num_rows: int, vocab_size: int, num_children: int, dtype: torch.dtype) -> Case:
    """Logits as a model gives them, with temperatures."""
    from double_kernels.top_branches import top_branches_reference
    from double_kernels.triton_top_branches import top_branches_triton

    torch.manual_seed(0)
    logits = (3 * torch.randn(num_rows, vocab_size, device="cuda")).to(dtype)
    temperatures = torch.rand(num_rows, device="cuda") + 0.5

    def composed() -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.float() / temperatures[:, None]
        values, tokens = torch.topk(scores, num_children)
        return tokens, (values - torch.logsumexp(scores, -1, keepdim=True)).exp()

    tokens, probs = top_branches_triton(logits, num_children, temperatures)
    expected_tokens, expected_probs = top_branches_reference(logits, num_children, temperatures)
    if not torch.equal(tokens, expected_tokens) or not torch.allclose(probs, expected_probs, rtol=1e-5, atol=0):
        raise _DifferenceError("top_branches and its reference differ")
    words = logits.view(torch.int64)
    name = f"R{num_rows}-V{vocab_size}-F{num_children}-{str(dtype).removeprefix('torch.')}"
    runs = {
        "kernel": lambda: top_branches_triton(logits, num_children, temperatures),
        "reference": lambda: top_branches_reference(logits, num_children, temperatures),
        "torch": composed,
    }
    read = [lambda: words.amax(dim=-1), words.amax, words.sum]
    return Case("top_branches", name, runs, "one read of the logits", read, logits.nbytes)


class _DifferenceError(Exception):
    """An op and its reference disagree: there is nothing to measure."""


CASES: dict[str, Callable[[], Case]] = {
    **{f"fork_pages-{size}": (lambda size=size: fork_case(size, 16)) for size in (2, 16, 64, 256, 1024)},
    "fork_pages-part": lambda: fork_case(256, 9),
    **{
        f"top_branches-{rows_}-{vocab}-{f}": (lambda r=rows_, v=vocab, f=f: branches_case(r, v, f, torch.bfloat16))
        for rows_, vocab, f in ((64, 151_936, 8), (64, 151_936, 32), (8, 151_936, 32), (64, 262_144, 64), (64, 32_000, 32))
    },
    "top_branches-float32": lambda: branches_case(64, 151_936, 32, torch.float32),
}


def copy_bandwidth(repeats: int) -> float:
    """Bytes that the device reads and writes in a second when torch copies a GiB."""
    source, destination = (torch.empty(1 << 30, dtype=torch.int8, device="cuda") for _ in range(2))
    return 2 * source.nbytes / median(device_seconds(lambda: destination.copy_(source), repeats))


def main() -> None:
    """Appends one row per op, shape and implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "kernels.csv")
    parser.add_argument("--cases", nargs="*", choices=sorted(CASES), default=list(CASES), metavar="CASE", help=", ".join(CASES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("make bench-gpu: torch finds no GPU here, and the kernels are measured on nothing else")
    launch_us = 1e6 * median(device_seconds(lambda: torch.cuda._sleep(0), options.repeats))
    shared: dict[str, rows.Value] = {
        "launch_us": launch_us,
        "copy_gb_per_s": copy_bandwidth(options.repeats) / 1e9,
        "gpu": torch.cuda.get_device_name(),
    }
    provenance = rows.provenance("benchmarks.kernel_bench")
    provenance["versions"] = f"{provenance['versions']}, triton {version('triton')}, cuda {torch.version.cuda}"
    for name in options.cases:
        try:
            case = CASES[name]()
        except _DifferenceError as difference:
            sys.exit(f"make bench-gpu: {difference}; nothing is measured until `make test-gpu` passes")
        limit_us = 1e6 * min(median(device_seconds(run, options.repeats)) for run in case.best)
        for implementation, run in case.runs.items():
            repeats = max(10, min(options.repeats, int(_MAX_SECONDS / host_seconds(run, 3))))
            seconds = device_seconds(run, repeats)
            row: dict[str, rows.Value] = {"op": case.op, "shape": case.shape, "implementation": implementation}
            row |= {f"p{int(100 * q)}_us": 1e6 * quantile(seconds, q) for q in (0.2, 0.5, 0.8, 0.99)}
            row |= {"host_us": 1e6 * host_seconds(run, repeats), "limit": case.limit, "limit_us": limit_us}
            row |= {"times_limit": 1e6 * median(seconds) / limit_us, "num_bytes": case.num_bytes, "repeats": repeats}
            print(row, flush=True)
            rows.append(options.output, row | shared | provenance)
        del case, run
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
