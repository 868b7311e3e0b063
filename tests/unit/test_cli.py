"""How every command of ``vllm-double`` ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_double.retrieval.datastore.build import build

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "vllm_double.cli"]
PLAN = ["plan", "--cost-ratio", ",".join(map(str, range(4, 104))), "--acceptance", "0.6"]


def start(processes: list[subprocess.Popen[Any]], *arguments: str) -> subprocess.Popen[Any]:
    pipe = subprocess.PIPE
    processes.append(subprocess.Popen([*COMMAND, *arguments], stdout=pipe, stderr=pipe, text=True, cwd=ROOT))
    return processes[-1]


def interrupt(process: subprocess.Popen[Any]) -> list[str]:
    """The lines of what it says then."""
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    return [line for line in said.splitlines() if line and "?B/s]" not in line]  # no progress bar


def test_an_interrupted_build_says_one_line_and_leaves_nothing(processes: list[subprocess.Popen[Any]], tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    os.mkfifo(source)
    target = ROOT / "benchmarks/pair/target"
    options = ["--tokenizer", str(target), "--input", str(source), "--output", str(tmp_path / "store")]
    process = start(processes, "datastore", "build", *options)
    with source.open("w"):  # returns when the build reads, and so has begun to write
        assert interrupt(process) == ["vllm-double: interrupted."]
    assert list(tmp_path.iterdir()) == [source]


def test_an_interrupted_plan_says_one_line(processes: list[subprocess.Popen[Any]]) -> None:
    process = start(processes, *PLAN)
    assert process.stdout is not None
    for _ in range(4):  # the first of many cells
        process.stdout.readline()
    assert interrupt(process) == ["vllm-double: interrupted."]


@pytest.mark.parametrize("command", [["settings"], ["check"], ["datastore", "inspect", "store"]])
def test_a_reader_that_has_read_enough_ends_a_command_without_a_word(
    processes: list[subprocess.Popen[Any]], tmp_path: Path, command: list[str]
) -> None:
    build(tmp_path / "store", [np.array([1, 2], np.int32)], 6, bytes(32))
    command = [str(tmp_path / word) if word == "store" else word for word in command]
    process = start(processes, *command)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    assert "Traceback" not in said and "vllm-double" not in said and "Exception" not in said
    assert process.wait(60) == 141
