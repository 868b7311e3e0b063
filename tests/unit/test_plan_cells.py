"""The driver that compares this loop with the best published method, cell by cell."""

from pathlib import Path

import pytest

from benchmarks import rows
from benchmarks.plan_cells import Cell, main, measure
from vllm_double.planning.predict import METHODS, Deployment, predict
from vllm_double.planning.script import Script


def cell(**speedups: float) -> Cell:
    return Cell(8.0, 0.65, 1, {"speculative": 1.0, "PEARL": 1.0, "Saguaro": 1.0, "Double": 1.0} | speedups, 0.0)


def test_ours_is_compared_with_the_fastest_published_method() -> None:
    assert cell(Saguaro=1.6, ours=2.0).best_ancestor == "Saguaro"
    assert cell(Saguaro=1.6, ours=2.0).ratio == pytest.approx(1.25)
    assert cell(PEARL=2.5, Saguaro=1.6, ours=2.0).ratio == pytest.approx(0.8)


def test_each_cell_is_a_row_with_the_defaults_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cells.csv"
    main(["--cost-ratio", "4", "8", "--acceptance", "0.65", "--batch", "1", "--tokens", "60", "--output", str(path)])
    found = rows.read(path)
    assert [(row["cost_ratio"], row["acceptance"], row["batch"]) for row in found] == [("4", "0.65", "1"), ("8", "0.65", "1")]
    expected = predict(Script(0.65), Deployment(8.0, 1, 0.03, 0.05, 1.0), 60).speedups
    assert [float(found[1][method]) for method in METHODS] == pytest.approx([expected[method] for method in METHODS], rel=1e-5)
    num_slower = sum(float(row["ratio"]) < 1 for row in found)
    assert f"slower than the best ancestor in {num_slower} of 2 cells" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_in_no_cell_is_ours_behind_the_best_published_method_by_more_than_chance(batch: int) -> None:
    """400 tokens are few, and the settings of the published methods are the best ones for these very texts. Over 2,000 tokens
    ours is behind by 1.3 % at most (plan_cells.csv)."""
    cells = [
        measure(ratio, acceptance, batch, 0.0, 400) for ratio in (4, 8, 16, 32, 64) for acceptance in (0.4, 0.65, 0.8, 0.9)
    ]
    assert not [cell.line for cell in cells if cell.ratio < 0.96]
    assert sum(cell.ratio >= 1.0 for cell in cells) >= 15
