"""Plots drawn from result rows and from nothing else: `make plots`.

    python -m benchmarks.plots --input benchmarks/results/bench.csv

One picture per condition (workload, temperature, batch): speed-up over plain vLLM by cost ratio C, a line per arm. The
latest row of an arm and a number of layers counts. And one per target that some run measured at three batches or more.
From reliability.csv beside the rows: how often each source of drafts was right, by what it said.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows
from vllm_double.target.calibration import NUM_BUCKETS

__all__ = ["latest", "main", "over_batch", "reliability"]

Key = tuple[str, str, str]
USUAL = "completion+edit"
"""The workload of the rows from before there was a column for it."""


def latest(table: Sequence[dict[str, str]]) -> dict[Key, dict[str, dict[str, dict[str, str]]]]:
    """{(workload, sampling, batch): {arm: {layers: row}}}; later rows replace earlier ones."""
    found: dict[Key, dict[str, dict[str, dict[str, str]]]] = {}
    for row in table:
        cell = found.setdefault((row.get("workload") or USUAL, sampling(row), row["batch"]), {})
        cell.setdefault(row["arm"], {})[row["layers"]] = row
    return found


def sampling(row: Mapping[str, str]) -> str:
    """The temperature, with top_p and top_k where requests had them: ``1``, ``1-p0.9-k20``."""
    found = row["temperature"]
    for column, letter in (("top_p", "p"), ("top_k", "k")):
        if row.get(column):
            found += f"-{letter}{row[column]}"
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Writes speedup-T<temperature>-B<batch>.svg and batches-T<temperature>-L<layers>.svg beside the rows; a workload that is
    not the usual one is named, too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=rows.RESULTS / "bench.csv")
    options = parser.parse_args(argv)
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    table = rows.read(options.input)
    for (workload, temperature, batch), arms in latest(table).items():
        ratios = {n: row["cost_ratio"] for by_layers in arms.values() for n, row in by_layers.items()}
        by_ratio = all(ratios.values())
        lines = {arm: {float(ratios[n] if by_ratio else n): row for n, row in found.items()} for arm, found in arms.items()}
        figure, axes = _draw(plt, lines, f"{workload}, T = {temperature}, batch {batch}")
        axes.set_xlabel("C = target step / draft forward" if by_ratio else "layers of the target")
        _save(plt, figure, options.input, f"speedup-T{temperature}-B{batch}", workload)
    for (workload, temperature, layers), batches in over_batch(table).items():
        figure, axes = _draw(plt, batches, f"{workload}, T = {temperature}, {layers} layers")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("batch")
        _save(plt, figure, options.input, f"batches-T{temperature}-L{layers}", workload)
    if (file := options.input.parent / "reliability.csv").exists():
        for kind, sources in reliability(rows.read(file)).items():
            figure, axes = plt.subplots(figsize=(5, 5), constrained_layout=True)
            axes.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
            for source, points in sources.items():
                axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=source)
            axes.set_xlabel("probability that the source gave")
            axes.set_ylabel("share that the target agreed with")
            axes.set_title(f"{kind} requests", fontsize=8)
            axes.legend(fontsize=8)
            _save(plt, figure, file, f"reliability-{kind}", USUAL)


def reliability(table: Sequence[dict[str, str]], least_trials: int = 20) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{"greedy" or "sampled": {source: [(said, right), ...]}} of the latest run; buckets of few trials tell nothing."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in table:
        if row["time"] == table[-1]["time"] and float(row["trials"]) >= least_trials:
            sources = found.setdefault("sampled" if row["sampled"] == "True" else "greedy", {})
            middle = float(row["said"]) + 0.5 / NUM_BUCKETS
            sources.setdefault(row["source"], []).append((middle, float(row["right"])))
    return found


def over_batch(table: Sequence[dict[str, str]]) -> dict[Key, dict[str, dict[float, dict[str, str]]]]:
    """{(workload, sampling, layers): {arm: {batch: row}}} of the latest run that had three batches or more."""
    runs: dict[tuple[Key, str, str], dict[str, dict[float, dict[str, str]]]] = {}
    for row in table:
        key = (row.get("workload") or USUAL, sampling(row), row["layers"])
        run = runs.setdefault((key, row["command"], row["commit"].rstrip("+")), {})
        run.setdefault(row["arm"], {})[float(row["batch"])] = row
    return {key: run for (key, _, _), run in runs.items() if len(run.get("plain", ())) >= 3}


def _draw(plt: Any, lines: Mapping[str, Mapping[float, dict[str, str]]], title: str) -> tuple[Any, Any]:
    """A line per arm, of speed-ups by whatever the rows are keyed by."""
    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for arm, by_place in lines.items():
        points = sorted((place, float(row["speedup"])) for place, row in by_place.items())
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=arm)
    row = next(iter(next(iter(lines.values())).values()))
    vllm = row["versions"].split(", ")[0]
    conditions = f"{row['machine']}; {row['dtype']}; {vllm}; medians of {row['rounds']} rounds"
    axes.set_ylabel("tokens/s over plain vLLM")
    axes.set_title(f"{title}\n{conditions}", fontsize=8)
    axes.axhline(1.0, color="grey", linewidth=0.5)
    axes.legend(fontsize=8)
    return figure, axes


def _save(plt: Any, figure: Any, source: Path, name: str, workload: str) -> None:
    output = source.parent / (name + (f"-{workload}" if workload != USUAL else "") + ".svg")
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)
    print(output)


if __name__ == "__main__":
    main()
