"""Plots drawn from result rows and from nothing else: `make plots`.

    python -m benchmarks.plots --input benchmarks/results/bench.csv

One picture per condition (workload, temperature, batch): speed-up over plain vLLM by cost ratio C, a line per arm. The
latest row of an arm and a number of layers counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import rows

__all__ = ["latest", "main"]

Key = tuple[str, str, str]
USUAL = "completion+edit"
"""The workload of the rows from before there was a column for it."""


def latest(table: Sequence[dict[str, str]]) -> dict[Key, dict[str, dict[str, dict[str, str]]]]:
    """{(workload, temperature, batch): {arm: {layers: row}}}; later rows replace earlier ones."""
    found: dict[Key, dict[str, dict[str, dict[str, str]]]] = {}
    for row in table:
        cell = found.setdefault((row.get("workload") or USUAL, row["temperature"], row["batch"]), {})
        cell.setdefault(row["arm"], {})[row["layers"]] = row
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Writes speedup-T<temperature>-B<batch>.svg beside the rows, and ones with its name for another workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=rows.RESULTS / "bench.csv")
    options = parser.parse_args(argv)
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    for (workload, temperature, batch), arms in latest(rows.read(options.input)).items():
        figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
        ratios = {n: row["cost_ratio"] for by_layers in arms.values() for n, row in by_layers.items()}
        by_ratio = all(ratios.values())
        conditions = ""
        for arm, by_layers in arms.items():
            points = sorted((float(ratios[n] if by_ratio else n), float(row["speedup"])) for n, row in by_layers.items())
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=arm)
            row = next(iter(by_layers.values()))
            vllm = row["versions"].split(", ")[0]
            conditions = f"{row['machine']}; {row['dtype']}; {vllm}; medians of {row['rounds']} rounds"
        axes.set_xlabel("C = target step / draft forward" if by_ratio else "layers of the target")
        axes.set_ylabel("tokens/s over plain vLLM")
        axes.set_title(f"{workload}, T = {temperature}, batch {batch}\n{conditions}", fontsize=8)
        axes.axhline(1.0, color="grey", linewidth=0.5)
        axes.legend(fontsize=8)
        name = f"speedup-T{temperature}-B{batch}" + (f"-{workload}" if workload != USUAL else "")
        output = options.input.parent / f"{name}.svg"
        figure.savefig(output, metadata={"Date": None})
        plt.close(figure)
        print(output)


if __name__ == "__main__":
    main()
