"""Step time of the plain target by number of layers, and the number of layers that a cost ratio C takes.

    python -m benchmarks.cost --layers 6 36 66 --draft-step-ms 1.9 --wanted 4 8 16 32

The step time is the median gap between the tokens of a stream at batch 1: the whole step that a token costs,
engine and HTTP included. C = step time of the target / time of a draft forward.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks import rows, workload
from benchmarks.arms import Choices, variants
from benchmarks.harness import Fleet
from benchmarks.machine import cores, parse_cores
from benchmarks.server import ServerConfig, exit_on_sigterm
from benchmarks.stats import quantile

__all__ = ["fit", "layers_for", "main"]


def fit(layers: Sequence[float], step_ms: Sequence[float]) -> tuple[float, float]:
    """Least squares: (milliseconds without layers, milliseconds per layer). ValueError below two points."""
    if len(set(layers)) < 2:
        raise ValueError("a line needs two different numbers of layers")
    mean_layers, mean_ms = sum(layers) / len(layers), sum(step_ms) / len(step_ms)
    spread = sum((x - mean_layers) ** 2 for x in layers)
    slope = sum((x - mean_layers) * (y - mean_ms) for x, y in zip(layers, step_ms, strict=True)) / spread
    return mean_ms - slope * mean_layers, slope


def layers_for(cost_ratio: float, draft_step_ms: float, line: tuple[float, float]) -> int:
    """Layers with which a target step takes ``cost_ratio`` draft forwards; at least 1."""
    base, slope = line
    return max(1, round((cost_ratio * draft_step_ms - base) / slope))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the line and appends one row per number of layers and thread split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[6, 36, 66])
    parser.add_argument("--draft-step-ms", type=float, help="time of a draft forward on its own core")
    parser.add_argument("--wanted", nargs="+", type=float, default=[4, 8, 16, 32], help="cost ratios C")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--target", type=Path, default=workload.TARGET)
    parser.add_argument("--prompts", type=Path, default=workload.PROMPTS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cores", type=parse_cores, default=cores())
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "cost.csv")
    options = parser.parse_args(argv)
    exit_on_sigterm()
    choices = Choices(workload.DRAFT, tuple(options.cores))
    requests = workload.requests(workload.load_prompts(options.prompts, options.num_prompts), options.max_tokens, 0.0)
    steps: dict[str | None, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="vllm-double-cost-") as folder:
        for layers in options.layers:
            target = workload.inflated(options.target, layers, Path(folder))
            base = ServerConfig(target, choices.cores, dtype=options.dtype, compile=options.compile)
            with Fleet(variants("plain", choices), base, Path(folder)) as fleet:
                fleet.warm_up(requests[:1], 1)
                for arm in fleet.arms:
                    gaps = [1000 * gap for c in fleet.ask(arm, requests, 1).completions for gap in c.gaps]
                    steps.setdefault(arm.threads, []).append(median(gaps))
                    print(f"{layers:3} layers, threads {arm.threads}: {median(gaps):.2f} ms a step", flush=True)
                    row: dict[str, rows.Value] = {
                        "layers": layers,
                        "threads": arm.threads,
                        "cores": ",".join(map(str, options.cores)),
                        "dtype": options.dtype,
                        "eager": not options.compile,
                        "step_ms_p20": quantile(gaps, 0.2),
                        "step_ms_p50": median(gaps),
                        "step_ms_p80": quantile(gaps, 0.8),
                    }
                    rows.append(options.output, row | rows.provenance("benchmarks.cost"))
    for threads, step_ms in steps.items():
        if len(set(options.layers)) < 2:
            continue
        line = fit(options.layers, step_ms)
        print(f"threads {threads}: {line[0]:.2f} ms + {line[1]:.3f} ms a layer")
        for ratio in options.wanted if options.draft_step_ms else []:
            print(f"  C = {ratio:g}: {layers_for(ratio, options.draft_step_ms, line)} layers")


if __name__ == "__main__":
    main()
