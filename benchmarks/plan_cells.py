"""Is this loop at least as fast as the best published method in every deployment? In the scripted world of `vllm-double plan`.

    python -m benchmarks.plan_cells

A cell is a cost ratio C, an acceptance and a batch; all else has the defaults of the command. Printed are the speed-ups of all
methods, the best ancestor (published method), ours over it, and the seconds that the cell took; in the end the cells in which
ours is slower, the worst first. Rows of results/plan_cells.csv. Everything but the seconds is the same in each run.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rows
from vllm_double.planning.arguments import add_arguments
from vllm_double.planning.predict import METHODS, Deployment, predict
from vllm_double.planning.script import Script

__all__ = ["Cell", "main", "measure"]

*ANCESTORS, OURS = METHODS


@dataclass(frozen=True, slots=True)
class Cell:
    """``speedups`` by method, over decoding without drafts."""

    cost_ratio: float
    acceptance: float
    batch: int
    speedups: dict[str, float]
    seconds: float

    @property
    def best_ancestor(self) -> str:
        return max(ANCESTORS, key=self.speedups.__getitem__)

    @property
    def ratio(self) -> float:
        """Ours over the best ancestor."""
        return self.speedups[OURS] / self.speedups[self.best_ancestor]

    @property
    def line(self) -> str:
        speedups = "".join(f"{self.speedups[method]:{_width(method)}.2f}" for method in METHODS)
        begins = f"{self.cost_ratio:5g}{self.acceptance:12g}{self.batch:7}{speedups}"
        return f"{begins}  {self.best_ancestor:13}{self.ratio:6.3f}{self.seconds:9.1f}"


def measure(cost_ratio: float, acceptance: float, batch: int, temperature: float, num_tokens: int) -> Cell:
    """One cell with the command's defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    usual = parser.parse_args(["--cost-ratio", str(cost_ratio), "--acceptance", str(acceptance)])
    started = time.perf_counter()
    found = predict(
        Script(acceptance, tail=usual.tail, copied=usual.retrieval_hit_rate, temperature=temperature),
        Deployment(cost_ratio, batch, usual.token_cost, usual.draft_token_cost, usual.gap),
        num_tokens,
        usual.num_speculative_tokens,
    )
    return Cell(cost_ratio, acceptance, batch, found.speedups, time.perf_counter() - started)


def _width(method: str) -> int:
    return 2 + max(6, len(method))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints and appends one row per cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost-ratio", nargs="+", type=float, default=[4, 8, 16, 32, 64])
    parser.add_argument("--acceptance", nargs="+", type=float, default=[0.4, 0.65, 0.8, 0.9])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=400, help="tokens that are simulated for each request")
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "plan_cells.csv")
    options = parser.parse_args(argv)
    methods = "".join(method.rjust(_width(method)) for method in METHODS)
    heading = f"{'C':>5}{'acceptance':>12}{'batch':>7}{methods}  {'best ancestor':13}{'ratio':>6}{'seconds':>9}"
    print(heading)
    cells = []
    for cost_ratio, acceptance, batch in itertools.product(options.cost_ratio, options.acceptance, options.batch):
        cell = measure(cost_ratio, acceptance, batch, options.temperature, options.tokens)
        print(cell.line, flush=True)
        cells.append(cell)
        row: dict[str, rows.Value] = {
            "cost_ratio": cost_ratio,
            "acceptance": acceptance,
            "batch": batch,
            "temperature": options.temperature,
            "tokens": options.tokens,
            **cell.speedups,
            "best_ancestor": cell.best_ancestor,
            "ratio": cell.ratio,
            "seconds": cell.seconds,
        }
        rows.append(options.output, row | rows.provenance("benchmarks.plan_cells"))
    slower = sorted((cell for cell in cells if cell.ratio < 1), key=lambda cell: cell.ratio)
    print(f"\nOurs is slower than the best ancestor in {len(slower)} of {len(cells)} cells:")
    if slower:
        print(heading, *(cell.line for cell in slower), sep="\n")


if __name__ == "__main__":
    main()
