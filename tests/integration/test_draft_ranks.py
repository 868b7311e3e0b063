"""A draft model on two devices proposes what it proposes on one."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


def run(num_ranks: int, folder: Path) -> list[Any]:
    """What the first of so many ranks finds; all have to end by themselves."""
    settings = {
        "model": str(ROOT / "benchmarks/pair/draft"),
        "num_ranks": num_ranks,
        "meeting": str(folder / f"ranks-{num_ranks}"),
    }
    cores = sorted(os.sched_getaffinity(0))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.draft_rank", json.dumps({**settings, "rank": rank})],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=partial(os.sched_setaffinity, 0, {cores[rank % len(cores)]}),
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
    try:
        lines = ranks[0].communicate(timeout=300)[0].splitlines()
        assert [rank.wait(60) for rank in ranks] == [0] * num_ranks
    finally:
        for rank in ranks:
            rank.kill()
            if rank.stdout is not None:
                rank.stdout.close()
    return json.loads(next(line for line in lines if line.startswith("found ")).removeprefix("found "))


def test_two_ranks_find_the_paths_of_one(tmp_path: Path) -> None:
    (one, path), (two, same) = run(1, tmp_path), run(2, tmp_path)
    assert path == same and len(path) > 8, "the drafting loop tells another path, or none"
    assert [tokens for tokens, _ in one] == [tokens for tokens, _ in two]
    for (_, expected), (_, found) in zip(one, two, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)  # sums of two halves round differently
