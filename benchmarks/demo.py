"""`make demo`: real completions with and without double, side by side, on the bundled pair.

Two servers on the same cores answer the same held-out prompts at batch 1 and 4. The target is the bundled
one, made as costly as a larger model (benchmarks/pair/inflate.py), in float32, so that every text has to be
identical; if one is not, the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
)
from rich.table import Table

from benchmarks import workload
from benchmarks.arms import ARMS, Arm, Choices, variants
from benchmarks.client import Completion, Request
from benchmarks.harness import Fleet, Series
from benchmarks.machine import cores, machine, parse_cores, versions
from benchmarks.metrics import counters
from benchmarks.server import ServerConfig, exit_on_sigterm
from benchmarks.stats import is_looping, share

__all__ = ["main"]

NUM_SLICES = 4
"""The arms take turns so many times, so that whatever disturbs the machine disturbs both."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every text of the double server is that of the plain one, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", default="double", choices=[name for name in ARMS if name != "plain"])
    parser.add_argument("--layers", type=int, default=32, help="decoder layers of the inflated target")
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--k", type=int, default=16, help="num_speculative_tokens")
    parser.add_argument("--target", type=Path, default=workload.TARGET)
    parser.add_argument("--draft", type=Path, default=workload.DRAFT)
    parser.add_argument("--prompts", type=Path, default=workload.PROMPTS)
    parser.add_argument("--cores", type=parse_cores, default=cores())
    options = parser.parse_args(argv)
    exit_on_sigterm()
    console = Console()
    every = tuple(options.cores)
    choices = Choices(options.draft, every, (options.k,), (options.k,), (options.k,))
    # The plain target's better split: all but the last core, which the API server then has.
    arms = [variants("plain", choices)[-1], variants(options.arm, choices)[-1]]
    prompts = workload.load_prompts(options.prompts, options.num_prompts)
    console.print(f"[bold]{machine()}[/bold]\n{versions()}")
    console.print(f"{len(prompts)} held-out prompts, greedy, up to {options.max_tokens} tokens each, float32")
    cells: list[tuple[int, Series, Series]] = []
    with tempfile.TemporaryDirectory(prefix="vllm-double-demo-") as folder:
        with console.status(f"Making the target {options.layers} layers deep (same function)"):
            target = workload.inflated(options.target, options.layers, Path(folder))
        with ExitStack() as stack:
            with console.status("Starting two servers on the same cores: plain vLLM and double"):
                fleet = stack.enter_context(Fleet(arms, ServerConfig(target, every), Path(folder)))
            requests = workload.requests(prompts, options.max_tokens, 0.0)
            fleet.warm_up(requests[:2], 2)
            for batch in options.batch:
                plain, ours = stream(fleet, arms, requests, batch, console)
                cells.append((batch, plain, ours))
    return report(console, cells)


def stream(fleet: Fleet, arms: Sequence[Arm], requests: Sequence[Request], batch: int, console: Console) -> list[Series]:
    """All arms answer all requests, in turn, slice by slice; a bar each, and the text that came back last."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:6.1f} tokens/s"), TextColumn("[dim]{task.fields[text]}[/dim]"),
    )  # fmt: skip
    series = [Series(arm) for arm in arms]
    before = [counters(fleet.server(arm).metrics()) for arm in arms]
    with Progress(*columns, console=console) as progress:
        bars = [progress.add_task(f"{arm.name:<8} batch {batch}", total=len(requests), rate=0.0, text="") for arm in arms]
        size = -(-len(requests) // NUM_SLICES)
        for start in range(0, len(requests), size):
            for one, bar in zip(series, bars, strict=True):

                def show(completion: Completion, bar: TaskID = bar) -> None:
                    lines = [line for line in completion.text.split("\n") if line.strip()]
                    progress.update(bar, advance=1, text=escape(max(lines, key=len, default="").strip()[:40]))

                one.rounds.append(fleet.ask(one.arm, requests[start : start + size], batch, show))
                progress.update(bar, rate=total_rate(one), text="")
    for one, earlier in zip(series, before, strict=True):
        one.read(earlier, counters(fleet.server(one.arm).metrics()))
    return series


def total_rate(series: Series) -> float:
    """Tokens per second over all slices."""
    return sum(part.tokens for part in series.rounds) / sum(part.seconds for part in series.rounds)


def report(console: Console, cells: Sequence[tuple[int, Series, Series]]) -> int:
    """Prints the table; 0 if all texts are identical, else 1."""
    table = Table("batch", "arm", "tokens/s", "speed-up", "tokens per target forward", "hit rate", "identical texts")
    failed = 0
    for batch, plain, ours in cells:
        identical = ours.identical(plain)
        failed += len(identical) - sum(identical)
        slow, fast = total_rate(plain), total_rate(ours)
        table.add_row(str(batch), plain.arm.name, f"{slow:.1f}", "1.00", *figures(plain), "")
        same = f"{sum(identical)} of {len(identical)}"
        table.add_row("", ours.arm.name, f"{fast:.1f}", f"{fast / slow:.2f}", *figures(ours), same)
    console.print(table)
    completions = [completion for _, _, ours in cells for completion in ours.completions]
    looping = share([is_looping(completion.tokens) for completion in completions])
    ended = share([completion.finish_reason == "stop" for completion in completions])
    console.print(f"{looping:.0%} of the texts end in a loop, {ended:.0%} end by themselves.")
    if failed:
        console.print(f"[red]{failed} texts differ from plain vLLM.[/red]")
    else:
        console.print("[green]Every text is identical to that of plain vLLM.[/green]")
    return int(failed > 0)


def figures(series: Series) -> tuple[str, str]:
    """Tokens per target forward and hit rate, as far as the server counts them."""
    found = series.speculation
    per_forward, hit_rate = found.tokens_per_forward, found.hit_rate
    return (f"{per_forward:.2f}" if per_forward else "-", f"{hit_rate:.2f}" if hit_rate is not None else "-")


if __name__ == "__main__":
    sys.exit(main())
