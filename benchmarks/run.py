"""Compares the arms: interleaved rounds on the same cores, one CSV row per arm and cell (temperature, top_p, batch).

    python -m benchmarks.run --layers 66 --temperature 0 1 --batch 1 4
    python -m benchmarks.run --layers 66 --temperature 1 --top-p 0.9 --seed 7
    python -m benchmarks.run --layers 66 --scripted 8

First every variant of every arm (chain lengths, thread splits) answers once, then the best of each arm
is measured in interleaved rounds, cell by cell. A row holds quantiles over the rounds; ``speedup`` is the
median of the round-wise ratio. Two servers of one kind differ by some percent for as long as they run: for a
small difference start them anew (``--starts``), beside ``plain-again``, whose difference is nothing but that.
``identical`` is the share of texts that equal plain's: at T = 0, and with ``--seed`` at T > 0, too. At T > 0 double draws
the same text as plain in vLLM's V2 runner only.
With ``--scripted`` the prompts are edits of code, and the target's replies are scripted (benchmarks/scripted).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import rows, scripted, workload
from benchmarks.arms import ARMS, OTHERS, WARM, Arm, Choices, default_arms, variants
from benchmarks.client import Request
from benchmarks.harness import Fleet, Series, interleave
from benchmarks.machine import cores, parse_cores
from benchmarks.scripted.write import write
from benchmarks.server import ServerConfig, exit_on_sigterm
from benchmarks.stats import is_looping, quantile, share

__all__ = ["Cell", "describe", "main", "portable"]


@dataclass(frozen=True)
class Cell:
    """One condition that all arms are compared under."""

    temperature: float
    top_p: float | None
    batch: int

    def __str__(self) -> str:
        nucleus = "" if self.top_p is None else f" top_p={self.top_p:g}"
        return f"T={self.temperature:g}{nucleus} batch {self.batch}"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--layers", nargs="+", type=int, default=[66], help="decoder layers of the inflated target: its cost")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0])
    parser.add_argument("--top-p", type=float, help="of all requests; the target's default if not given")
    parser.add_argument("--top-k", type=int, help="of all requests; the target's default if not given")
    parser.add_argument("--seed", type=int, help="of the first request; the next has the next; no seeds if not given")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=1, help="times that the servers are started; --rounds after each")
    parser.add_argument("--num-prompts", type=int, default=8, help="prompts of a round; at least the largest batch")
    parser.add_argument("--kinds", nargs="+", default=[], help="kinds of prompts; all if not given")
    parser.add_argument("--scripted", type=int, metavar="N", help="N scripted edits for prompts instead of --prompts")
    parser.add_argument("--max-tokens", type=int, help="128; of a scripted edit 1024, which all replies end before")
    parser.add_argument("--ngram-k", nargs="+", type=int, default=[2, 4, 6])
    parser.add_argument("--draft-k", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--double-k", nargs="+", type=int, default=[16])
    parser.add_argument("--threads", nargs="+", default=[], metavar="CORES", help="of the baselines; all splits if not given")
    parser.add_argument("--target", type=Path, default=workload.TARGET)
    parser.add_argument("--draft", type=Path, default=workload.DRAFT)
    parser.add_argument("--prompts", type=Path, default=workload.PROMPTS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--compile", action="store_true", help="compiled servers instead of eager ones")
    parser.add_argument("--cores", type=parse_cores, default=cores(), help="what every arm may use, as 0-3")
    parser.add_argument("--draft-step-ms", type=float, help="a draft forward, for C, where double's metrics don't tell")
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "bench.csv")
    parser.add_argument("--logs", type=Path, default=workload.PAIR.parent / "logs")
    options = parser.parse_args(argv)
    if options.arms is None:
        options.arms = default_arms(sampled=max(options.temperature) > 0)
    if options.scripted is not None:
        options.num_prompts = options.scripted
    if options.max_tokens is None:
        options.max_tokens = 128 if options.scripted is None else 1024
    if options.num_prompts < max(options.batch):
        parser.error("--num-prompts must not be below the largest --batch")
    if "plain" not in options.arms:
        parser.error("--arms needs plain: speed-ups and texts are compared with it")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all layer counts one after the other."""
    exit_on_sigterm()
    options = arguments(argv)
    choices = Choices(
        options.draft,
        tuple(options.cores),
        tuple(options.ngram_k),
        tuple(options.draft_k),
        tuple(options.double_k),
        tuple(options.threads),
    )
    tried = [variant for name in options.arms for variant in variants(name, choices)]
    cells = [Cell(temperature, options.top_p, batch) for temperature in options.temperature for batch in options.batch]
    with tempfile.TemporaryDirectory(prefix="vllm-double-bench-") as folder:
        for layers in options.layers:
            target = workload.inflated(options.target, layers, Path(folder))
            if options.scripted is not None:
                write(target, output := Path(folder) / f"scripted-{layers}", options.scripted)
                target, options.prompts = output, output / "prompts.jsonl"
            base = ServerConfig(
                target,
                tuple(options.cores),
                dtype=options.dtype,
                max_model_len=options.max_model_len,
                max_num_seqs=max(16, *options.batch),
                compile=options.compile,
                environment=scripted.environment() if options.scripted is not None else {},
            )
            best = choose(options, base, tried, cells)
            measure(options, base, best, layers)


def choose(
    options: argparse.Namespace, base: ServerConfig, tried: Sequence[Arm], cells: Sequence[Cell]
) -> dict[Cell, list[Arm]]:
    """The fastest variant of every arm, by cell; each variant has the machine for itself."""
    found: dict[Cell, dict[str, tuple[float, Arm]]] = {cell: {} for cell in cells}
    for arm in tried:
        alone = sum(other.name == arm.name for other in tried) == 1
        rates = dict.fromkeys(cells, 0.0) if alone else one_round(options, base, arm, cells)
        for cell, rate in rates.items():
            if arm.name not in found[cell] or rate > found[cell][arm.name][0]:
                found[cell][arm.name] = (rate, arm)
    return {cell: [arm for _, arm in by_name.values()] for cell, by_name in found.items()}


def one_round(options: argparse.Namespace, base: ServerConfig, arm: Arm, cells: Sequence[Cell]) -> dict[Cell, float]:
    """Tokens per second of one variant in every cell."""
    rates = {}
    with Fleet([arm], base, options.logs) as fleet:
        for cell in cells:
            requests = ask_for(options, cell)
            fleet.warm_up(requests[: cell.batch], cell.batch)
            rates[cell] = fleet.ask(arm, requests, cell.batch).tokens_per_second
            print(
                f"trying {cell!s:<16} {arm.label:<32} {rates[cell]:8.1f}/s",
                flush=True,
            )
    return rates


def prompts_of(options: argparse.Namespace) -> list[workload.Prompt]:
    """The prompts of every round."""
    return workload.load_prompts(options.prompts, options.num_prompts, options.kinds)


def ask_for(options: argparse.Namespace, cell: Cell) -> list[Request]:
    """The requests of one round."""
    return workload.requests(
        prompts_of(options),
        options.max_tokens,
        cell.temperature,
        top_p=cell.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )


def measure(options: argparse.Namespace, base: ServerConfig, best: dict[Cell, list[Arm]], layers: int) -> None:
    """Interleaved rounds of the chosen variants, all servers up at once; appends the rows."""
    arms = list({arm.label: arm for chosen in best.values() for arm in chosen}.values())
    measured = {cell: [Series(arm) for arm in chosen] for cell, chosen in best.items()}
    idle = 0.0
    for start in range(options.starts):
        with Fleet(arms, base, options.logs) as fleet:
            fleet.warm_up(ask_for(options, next(iter(best)))[:2], 2)
            idle = max(idle, fleet.idle_share())
            if idle > 0.1:
                print(f"Idle servers burn {idle:.2f} cores: the figures are disturbed.", flush=True)
            for cell, series in measured.items():
                print(f"{layers} layers, {cell}, start {start + 1}", flush=True)
                interleave(
                    fleet,
                    series,
                    ask_for(options, cell),
                    cell.batch,
                    options.rounds,
                    lambda line: print(f"  {line}", flush=True),
                )
                if start == options.starts - 1:
                    for row in cell_rows(options, cell, layers, series):
                        row["idle_cores"] = idle
                        row |= rows.provenance("benchmarks.run")
                        rows.append(options.output, row)


def cell_rows(options: argparse.Namespace, cell: Cell, layers: int, series: Sequence[Series]) -> list[dict[str, rows.Value]]:
    """One row per arm of a cell."""
    plain = next(one for one in series if one.arm.name == "plain")
    target_step_ms = 1000 * median(gap for completion in plain.completions for gap in completion.gaps)
    reported = [one.speculation.draft_step_ms for one in series]
    draft_step_ms = next((step for step in reported if step), options.draft_step_ms)
    is_repeatable = cell.temperature == 0 or options.seed is not None
    found = []
    for one in series:
        ratios = {other.arm.name: one.speedup(other) for other in series if other is not one}
        others = [ratio for name, ratio in ratios.items() if name in OTHERS]
        row: dict[str, rows.Value] = {
            "arm": one.arm.name,
            "config": json.dumps(portable(one.arm.speculative)),
            "threads": one.arm.threads,
            "cores": ",".join(map(str, options.cores)),
            "target": options.target.name,
            "layers": layers,
            "dtype": options.dtype,
            "eager": not options.compile,
            "workload": "+".join(sorted({prompt.kind for prompt in prompts_of(options)})),
            "temperature": cell.temperature,
            "top_p": cell.top_p,
            "top_k": options.top_k,
            "seed": options.seed,
            "batch": cell.batch,
            "max_tokens": options.max_tokens,
            "target_step_ms": target_step_ms,
            "draft_step_ms": draft_step_ms,
            "cost_ratio": target_step_ms / draft_step_ms if draft_step_ms and cell.batch == 1 else None,
            "speedup": one.speedup(plain),
            "against_best_other": min(others) if others else None,
            "ratios": json.dumps({name: round(ratio, 4) for name, ratio in ratios.items()}),
            "identical": share(one.identical(plain)) if is_repeatable else None,
        }
        found.append(row | describe(one))
    return found


def describe(series: Series) -> dict[str, rows.Value]:
    """Columns that follow from one arm's rounds alone."""
    rates, completions, speculation = series.rates, series.completions, series.speculation
    latencies = [completion.seconds for completion in completions]
    first = [completion.first_token_s for completion in completions]
    return {
        "rounds": len(rates),
        "prompts": len(series.rounds[0].completions),
        "tokens": median(round_.tokens for round_ in series.rounds),
        "tokens_per_second_p20": quantile(rates, 0.2),
        "tokens_per_second_p50": quantile(rates, 0.5),
        "tokens_per_second_p80": quantile(rates, 0.8),
        "round_tokens_per_second": json.dumps([round(rate, 2) for rate in rates]),
        "latency_s_p50": quantile(latencies, 0.5),
        "latency_s_p80": quantile(latencies, 0.8),
        "first_token_s_p50": quantile(first, 0.5),
        "first_token_s_p99": quantile(first, 0.99),
        "looping": share([is_looping(completion.tokens) for completion in completions]),
        "ended_by_eos": share([completion.finish_reason == "stop" for completion in completions]),
        "tokens_per_forward": speculation.tokens_per_forward,
        "acceptance": speculation.acceptance,
        "chain_length": speculation.chain_length,
        "hit_rate": speculation.hit_rate,
        "waits_per_round": speculation.waits_per_round,
        "wait_ms": speculation.wait_ms,
        "missed_share": speculation.missed_share,
        "propose_ms": speculation.propose_ms,
        "caches": "warm" if series.arm.name in WARM else "cold",
    }


def portable(speculative: dict[str, object] | None) -> dict[str, object]:
    """The configuration without folders of this machine."""
    if speculative is None:
        return {}
    model = speculative.get("model")
    return speculative | ({"model": Path(str(model)).name} if model else {})


if __name__ == "__main__":
    main()
