"""A datastore's file that is changed, cut off or slow while it is looked up in."""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vllm_double.retrieval import Datastore, DatastoreRetriever
from vllm_double.retrieval.datastore import build as builder

TOKENIZER = b"\1" * 32
PERIOD = list(range(50))
AT_LEAST_S = 10.0


def build(path: Path, step: int = 1) -> Path:
    documents = [np.array([(step * token) % 50 for token in PERIOD] * 40, np.int32) for _ in range(10)]
    builder.build(path, documents, 50, TOKENIZER)
    return path


def begun(path: Path) -> DatastoreRetriever:
    retriever = DatastoreRetriever(Datastore(path, TOKENIZER))
    retriever.start(0, np.array([3, 4, 5], np.int32))
    return retriever


def found(retriever: DatastoreRetriever) -> list[int]:
    continuation = retriever.lookup(0, [], 8)
    return continuation.tokens if continuation is not None else []


CUT = """
import os, sys
from pathlib import Path
from tests.unit.test_datastore_changes import begun, found
path = Path(sys.argv[1])
retriever = begun(path)
os.truncate(path, int(sys.argv[2]))
print(found(retriever), found(retriever))
"""


@pytest.mark.parametrize("num_bytes", [0, 4096])
def test_a_file_that_is_cut_off_costs_drafts_and_not_the_process(tmp_path: Path, num_bytes: int) -> None:
    command = [sys.executable, "-c", CUT, str(build(tmp_path / "store")), str(num_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "[] []\n"), done.stderr


def test_nothing_is_read_of_a_file_that_is_replaced_in_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, other = build(tmp_path / "store"), build(tmp_path / "other", step=7)
    retriever = begun(path)
    path.write_bytes(other.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert [found(retriever) for _ in range(3)] == [[], [], []]
    assert len(caplog.messages) == 1 and "was changed" in caplog.messages[0]


def test_a_file_that_is_replaced_as_the_builder_does_goes_on_as_it_was(tmp_path: Path) -> None:
    path = build(tmp_path / "store")
    retriever = begun(path)
    build(path, step=7)
    assert found(retriever) == PERIOD[6:14]


def test_of_several_files_those_that_did_not_change_go_on(tmp_path: Path) -> None:
    path, other = build(tmp_path / "store"), build(tmp_path / "other")
    retriever = DatastoreRetriever(Datastore(path, TOKENIZER), Datastore(other, TOKENIZER))
    retriever.start(0, np.array([3, 4, 5], np.int32))
    path.write_bytes(path.read_bytes())
    assert [found(retriever) for _ in range(2)] == [[], PERIOD[6:14]]


def test_a_slow_file_delays_no_lookup_and_answers_when_it_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "store")
    retriever = begun(path)
    (datastore,) = retriever._files
    datastore.reader.blocks.reading["fd"] = -1  # nothing is in the operating system's memory
    may_read, is_asked, pread = threading.Event(), threading.Event(), os.pread

    def slow(*arguments: int) -> bytes:
        is_asked.set()
        assert may_read.wait(AT_LEAST_S)
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", slow)
    assert found(retriever) == []
    assert is_asked.wait(AT_LEAST_S), "nobody reads what was missing"
    assert found(retriever) == []
    may_read.set()
    end = time.monotonic() + AT_LEAST_S
    while found(retriever) != PERIOD[6:14]:
        assert time.monotonic() < end


def test_one_call_reads_a_bounded_number_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = begun(build(tmp_path / "store"))
    for name in ("_MAX_READS", "_LEAST_READS"):
        monkeypatch.setattr(f"vllm_double.retrieval.datastore.source.{name}", 3)
    (datastore,) = retriever._files
    answers = []
    for _ in range(100):
        answers.append(found(retriever))
        assert datastore.reader.blocks.reading["num_reads"][0] <= 3
    assert answers[0] == [] and answers[-1] == PERIOD[6:14]
    assert all(answer == PERIOD[6:14][: len(answer)] for answer in answers), "an answer goes no further than what was read"


def test_a_datastore_that_is_given_up_leaves_no_file_open_and_no_thread(tmp_path: Path) -> None:
    path = build(tmp_path / "store")
    for is_slow in (False, True):
        before = set(Path("/proc/self/fd").iterdir())
        retriever = begun(path)
        (datastore,) = retriever._files
        thread = None
        if is_slow:
            datastore.reader.blocks.reading["fd"] = -1
            found(retriever)
            thread = datastore.reader._thread
        del retriever, datastore
        if thread is not None:
            thread.join(AT_LEAST_S)
            assert not thread.is_alive()
        assert set(Path("/proc/self/fd").iterdir()) <= before
