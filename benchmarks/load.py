"""How long a request waits for its first token under mixed load: python -m benchmarks.load --layers 20 --rate 2

Requests arrive by a Poisson process, at the same moments for every arm. Prompts are pieces of the held-out texts, of any
length up to the longest, as answers are: prompts are read while others decode. A row of results/load.csv for each arm:
quantiles over all requests of all interleaved rounds, and over those of plain vLLM.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median

from benchmarks import rows, workload
from benchmarks.arms import ARMS, Choices, variants
from benchmarks.harness import Fleet, Series, interleave
from benchmarks.machine import cores, parse_cores
from benchmarks.run import portable
from benchmarks.server import ServerConfig, exit_on_sigterm
from benchmarks.soak import requests
from benchmarks.stats import quantile, share

__all__ = ["main", "poisson", "row_of"]


def poisson(count: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds at which ``count`` requests arrive, ``rate`` of them a second."""
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(rate) for _ in range(count)))


def row_of(one: Series, plain: Series) -> dict[str, rows.Value]:
    """Columns of an arm: quantiles in seconds, and each over plain vLLM's."""
    # Little's law: so many were in flight at a time.
    in_flight = [sum(completion.seconds for completion in round_.completions) / round_.seconds for round_ in one.rounds]
    row: dict[str, rows.Value] = {"in_flight": median(in_flight)}
    for name, of in (("first_token", "first_token_s"), ("latency", "seconds")):
        ours, theirs = ([getattr(completion, of) for completion in series.completions] for series in (one, plain))
        for percent in (50, 99):
            value = quantile(ours, percent / 100)
            row[f"{name}_s_p{percent}"] = value
            row[f"{name}_p{percent}_over_plain"] = value / quantile(theirs, percent / 100)
    return row | {"identical": share(one.identical(plain)), "hit_rate": one.speculation.hit_rate}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints and files the rows."""
    exit_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms", nargs="+", default=["plain", "double"], choices=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--requests", type=int, default=64, help="of a round")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the longest prompt")
    parser.add_argument("--max-tokens", type=int, default=128, help="of the longest answer")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cores", type=parse_cores, default=cores())
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "load.csv")
    parser.add_argument("--logs", type=Path, default=workload.PAIR.parent / "logs")
    options = parser.parse_args(argv)
    if "plain" not in options.arms:
        parser.error("--arms needs plain: times and texts are compared with it")
    choices = Choices(workload.DRAFT, tuple(options.cores), draft_k=(3,), ngram_k=(5,), threads=(str(options.cores[0]),))
    series = [Series(variants(name, choices)[0]) for name in options.arms]
    asked = requests(options.requests, options.prompt_tokens, options.max_tokens)
    times = poisson(options.requests, options.rate)
    with tempfile.TemporaryDirectory(prefix="vllm-double-load-") as folder:
        target = workload.inflated(workload.TARGET, options.layers, Path(folder))
        base = ServerConfig(target, tuple(options.cores), max_num_seqs=32)
        with Fleet([one.arm for one in series], base, options.logs) as fleet:
            fleet.warm_up(asked[:2], 2)
            interleave(fleet, series, asked, times, options.rounds, lambda line: print(line, flush=True))
    plain = next(one for one in series if one.arm.name == "plain")
    for one in series:
        row: dict[str, rows.Value] = {
            "arm": one.arm.name, "config": json.dumps(portable(one.arm.speculative)), "threads": one.arm.threads,
            "layers": options.layers, "rate": options.rate, "requests": options.requests, "rounds": options.rounds,
            "prompt_tokens": options.prompt_tokens, "max_tokens": options.max_tokens,
        }  # fmt: skip
        row |= row_of(one, plain)
        print(
            ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
        )
        rows.append(options.output, row | rows.provenance("benchmarks.load"))


if __name__ == "__main__":
    main()
