"""``vllm-double plan``: predicted speed-ups of every method as a table and, if wanted, as a plot."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_double.planning.predict import METHODS, Deployment, Prediction, predict
from vllm_double.planning.script import Script

__all__ = ["curves", "plan"]


def plan(options: argparse.Namespace) -> int:
    """Print the table, row by row, and draw the plot; returns the exit code."""
    try:
        script = Script(
            options.acceptance, tail=options.tail, copied=options.retrieval_hit_rate, temperature=options.temperature
        )
        if options.plot is not None:
            _check_plot(options.plot)
    except ValueError as error:
        print(f"vllm-double: {error}.", file=sys.stderr)
        return 2
    print(
        f"Acceptance {script.acceptance:g}, retrieval hit rate {script.copied:g}, temperature {script.temperature:g}. "
        f"A verified token adds {options.token_cost:g} of a target step, a drafted token {options.draft_token_cost:g} of a "
        f"draft forward, a step {options.gap:g} draft forwards.\n"
        "Speed-up over plain decoding. (k): the best draft length of plain speculative decoding. Last columns: ours."
    )
    print(_line("batch", "C", *METHODS, "(k)", "tokens/forward", "hit rate"))
    predictions = []
    for batch, cost_ratio in itertools.product(options.batch, options.cost_ratio):
        deployment = Deployment(cost_ratio, batch, options.token_cost, options.draft_token_cost, options.gap)
        found = predict(script, deployment, options.tokens, options.num_speculative_tokens)
        predictions.append(found)
        speedups = (f"{found.speedups[method]:.2f}" for method in METHODS)
        ours = f"{found.ours.tokens_per_forward:.2f}", f"{found.ours.hit_rate:.2f}"
        print(_line(str(batch), f"{cost_ratio:g}", *speedups, f"({found.draft_length})", *ours), flush=True)
    if options.plot is not None:
        try:
            _plot(predictions, options.plot)
        except OSError as error:
            print(f"vllm-double: {error.strerror}: {options.plot}.", file=sys.stderr)
            return 1
    return 0


def curves(predictions: Sequence[Prediction]) -> dict[int, dict[str, list[tuple[float, float]]]]:
    """{batch: {method: [(C, speed-up), ...]}}, C rising: the lines of the plot."""
    found: dict[int, dict[str, list[tuple[float, float]]]] = {}
    for one in sorted(predictions, key=lambda one: one.deployment.cost_ratio):
        for method in METHODS:
            lines = found.setdefault(one.deployment.batch, {})
            lines.setdefault(method, []).append((one.deployment.cost_ratio, one.speedups[method]))
    return found


def _line(*cells: str) -> str:
    widths = (5, 5, *(max(6, len(method)) for method in METHODS), 4, 14, 8)
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _check_plot(path: Path) -> None:
    """Raises ValueError if nothing can draw, or not in this format; called before minutes of simulation."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install 'vllm-double[plots]'") from None
    if path.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        raise ValueError(f"--plot {path.name} does not end in a format that matplotlib writes, such as .png or .svg")


def _plot(predictions: Sequence[Prediction], path: Path) -> None:
    """A panel for each batch, a line for each method."""
    from matplotlib.figure import Figure

    panels = curves(predictions)
    figure = Figure(figsize=(1 + 4.5 * len(panels), 4), constrained_layout=True)
    for place, (batch, lines) in enumerate(sorted(panels.items())):
        axes = figure.add_subplot(1, len(panels), place + 1)
        for method, points in lines.items():
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=method)
        axes.axhline(1.0, color="grey", linewidth=0.5)
        axes.set_xlabel("C = target step / draft forward")
        axes.set_ylabel("tokens/s over plain decoding")
        axes.set_title(f"batch {batch}, predicted", fontsize=9)
        axes.legend(fontsize=8)
    figure.savefig(path)
