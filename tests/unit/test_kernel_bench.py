"""The benchmark of the kernels on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_it_measures_nothing_and_says_so(tmp_path: Path) -> None:
    output = tmp_path / "kernels.csv"
    command = [sys.executable, "-m", "benchmarks.kernel_bench", "--output", str(output)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("make bench-gpu: torch finds no GPU here")
    assert not output.exists()
