"""Drawing tokens on a CPU: with our noise, beside vLLM's own sampling of as many rows.

    python -m benchmarks.sampling_bench

Random logits of a real vocabulary's size, no filters. The arms take turns; a row of results/sampling.csv for each, with
quantiles over the turns in milliseconds. ``over_vllm`` is the median of the turn-wise ratio to what vLLM's V1 runner calls on a
CPU (TopKTopPSampler.forward, a native Gumbel kernel); ``native`` is the same in torch's operators. Nothing else may run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import rows
from benchmarks.stats import median_ratio, quantile

__all__ = ["arguments", "arms", "main", "rows_of", "take_turns"]

VLLM = "vllm"
Draw = Callable[[], object]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32], help="tokens drawn in one call")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--scale", type=float, default=4.0, help="standard deviation of the logits")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "sampling.csv")
    return parser.parse_args(argv)


def arms(logits: torch.Tensor) -> dict[str, Draw]:
    """One draw for each row of logits float32 [rows, vocab], by each of the arms; the seeded ones have a seed per row."""
    from double_kernels import sample_with_noise
    from vllm.v1.sample.sampler import Sampler

    sampler = Sampler().topk_topp_sampler
    count = len(logits)
    seeds, positions = torch.arange(count) + (1 << 40), torch.arange(count) * 37
    generators = {row: torch.Generator().manual_seed(row) for row in range(count)}
    return {
        "double": lambda: sample_with_noise(logits, seeds, positions),
        VLLM: lambda: sampler(logits, {}, None, None),
        "vllm-seeded": lambda: sampler(logits, generators, None, None),
        "native": lambda: sampler.forward_native(logits, {}, None, None),
    }


def take_turns(draws: Mapping[str, Draw], turns: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds by arm: every turn calls each arm once, and each turn another one first. One turn before is not counted."""
    names = list(draws)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, turns):
        shift = turn % len(names)
        for name in [*names[shift:], *names[:shift]]:
            start = clock()
            draws[name]()
            seconds = clock() - start
            if turn >= 0:
                found[name].append(seconds)
    return found


def rows_of(seconds: Mapping[str, Sequence[float]]) -> list[dict[str, rows.Value]]:
    """The columns that follow from the measured times, an arm each."""
    return [
        {
            "arm": name,
            "turns": len(taken),
            "ms_p20": 1000 * quantile(taken, 0.2),
            "ms_p50": 1000 * quantile(taken, 0.5),
            "ms_p80": 1000 * quantile(taken, 0.8),
            "over_vllm": median_ratio(taken, seconds[VLLM]),
        }
        for name, taken in seconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Appends a row for each number of rows and arm."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for count in options.rows:
        draws = arms(options.scale * torch.randn(count, options.vocab))
        setting: dict[str, rows.Value] = {"rows": count, "vocab": options.vocab, "scale": options.scale}
        setting["threads"] = options.threads
        for row in rows_of(take_turns(draws, options.turns)):
            rows.append(options.output, setting | row | rows.provenance("benchmarks.sampling_bench"))
            print(f"{count:>3} rows  {row['arm']:<12} {row['ms_p50']:8.2f} ms  {row['over_vllm']:6.2f} x vllm", flush=True)


if __name__ == "__main__":
    main()
