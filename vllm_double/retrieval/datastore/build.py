"""Building a datastore: from a stream of documents to a file, in little memory, all or nothing."""

import fcntl
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from vllm_double.retrieval.base import Tokens
from vllm_double.retrieval.datastore.build_steps import build_steps
from vllm_double.retrieval.datastore.file import (
    MAGIC,
    MAX_TOKENS,
    MAX_VOCAB,
    SEPARATOR,
    SUFFIX,
    DatastoreError,
    Header,
    Section,
)
from vllm_double.retrieval.datastore.lookup_steps import MAX_DEPTH, NODE, NONE, SCAN

__all__ = ["build", "build_shards", "check_replaced", "partial_path"]

Ids = npt.NDArray[np.int32] | npt.NDArray[np.int64]

# Entries that are sorted at once (12 bytes each); more if one token is more frequent than that.
_PASS = 1 << 24
# Positions whose entry is held at once (4 bytes each).
_WINDOW = 1 << 26
_NOTHING = "The input has no document of two tokens or more."


def partial_path(output: Path) -> Path:
    """Where a build writes until it ends. What a killed build leaves there, the next one clears."""
    return output.with_name(f"{output.name}.partial")


def check_replaced(output: Path) -> None:
    """A build replaces its output and what a killed build left. Raises DatastoreError if either is anything but a datastore."""
    unfinished = {MAGIC, bytes(len(MAGIC)), b""}  # the header is written last
    for path, beginnings in ((output, {MAGIC}), (partial_path(output), unfinished)):
        if not path.exists() or path.is_dir():  # of folders the build itself says what is wrong
            continue
        beginning = None
        if path.is_file():
            with path.open("rb") as file:
                beginning = file.read(len(MAGIC))
        if beginning not in beginnings:
            raise DatastoreError(f'"{path}" exists and is not a datastore: it is not replaced.')


def build(
    output: Path,
    documents: Iterable[Ids],
    vocab_size: int,
    fingerprint: bytes,
    max_match: int = 32,
    show_progress: bool = False,
) -> Header:
    """Write a datastore of documents, each [n] ids below vocab_size, and put it in the place of ``output``.

    Raises DatastoreError if the documents cannot be indexed, OSError if the file cannot be written. The header is
    written when all else has reached the disk, so that nothing opens which is not whole.

    Memory, besides what is mapped from the file: 12 bytes for each of 2^24 entries, or of the occurrences of the most frequent
    token if those are more; 4 for each of 2^26 positions.
    """
    check_replaced(output)
    with _replacing(output) as file:
        header = _Builder(file, vocab_size, fingerprint, max_match, show_progress).run(documents)
        file.seek(0)
        file.write(header.pack())
    return header


def build_shards(
    output: Path,
    documents: Iterable[Ids],
    num_tokens: int,
    vocab_size: int,
    fingerprint: bytes,
    max_match: int = 32,
    show_progress: bool = False,
) -> list[Header]:
    """The same as a new folder of files of about ``num_tokens`` tokens each, which together may hold more than one file can.

    The headers are written when all files have reached the disk.
    """
    if not 1 <= num_tokens <= MAX_TOKENS // 2:
        raise DatastoreError(f"A shard has 1 to {MAX_TOKENS // 2} tokens, not {num_tokens}.")
    headers: dict[Path, Header] = {}
    with _new_folder(output) as folder:
        for number, shard in enumerate(_shards(documents, num_tokens)):
            path = folder / f"{number:05}{SUFFIX}"
            with path.open("w+b") as file:
                headers[path] = _Builder(file, vocab_size, fingerprint, max_match, show_progress).run(shard)
        if not headers:
            raise DatastoreError(_NOTHING)
        for path, header in headers.items():
            with path.open("r+b") as file:
                file.write(header.pack())
                file.flush()
                os.fsync(file.fileno())
    return list(headers.values())


def _shards(documents: Iterable[Ids], num_tokens: int) -> Iterator[Iterator[Ids]]:
    """Cut behind the document that fills a shard. A token alone continues nothing, and might be a shard of its own."""
    source = (document for document in documents if len(document) > 1)

    def shard(document: Ids | None) -> Iterator[Ids]:
        held = 0
        while document is not None:
            yield document
            held += len(document) + 1  # a separator
            document = next(source, None) if held < num_tokens else None

    for first in source:
        yield shard(first)


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """An empty folder that gets its name in the end, or goes away if there is an error."""
    partial = partial_path(output)
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, partial, output)
        left = list(partial.iterdir())
        if not all(re.fullmatch(rf"\d+{re.escape(SUFFIX)}", path.name) for path in left):
            raise DatastoreError(f'The folder "{partial}" is in the way: it holds other files.')
        try:
            if output.exists():
                raise DatastoreError(f'The output "{output}" exists already.')
            for path in left:
                path.unlink()
            yield partial
            os.fsync(descriptor)
            partial.rename(output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)
    _sync(output.absolute().parent)


def _lock(descriptor: int, partial: Path, output: Path) -> None:
    """Raises DatastoreError if another build has the partial file or folder, or has just given it its name."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DatastoreError(f'Another build is writing "{output}".') from None
    if not partial.exists() or not os.path.samestat(os.fstat(descriptor), partial.stat()):
        raise DatastoreError(f'Another build has just written "{output}".')


@contextmanager
def _replacing(output: Path) -> Iterator[BinaryIO]:
    """An empty file that takes the place of output in the end, or goes away if there is an error."""
    if output.is_dir():
        raise DatastoreError(f'The output "{output}" is a folder.')
    partial = partial_path(output)
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        _lock(file.fileno(), partial, output)
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.replace(output)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    _sync(output.absolute().parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Builder:
    """The sections, written one after another."""

    def __init__(self, file: BinaryIO, vocab_size: int, fingerprint: bytes, max_match: int, show_progress: bool) -> None:
        if not 1 <= vocab_size <= MAX_VOCAB:
            raise DatastoreError(f"A vocabulary has 1 to {MAX_VOCAB} tokens, not {vocab_size}.")
        if not 1 <= max_match < MAX_DEPTH:
            raise DatastoreError(f"Contexts have 1 to {MAX_DEPTH - 1} tokens, not {max_match}.")
        self._file = file
        self._header = Header(max_match, vocab_size, 0, 0, 0, 0, fingerprint)
        self._show_progress = show_progress
        self._steps = build_steps()

    def run(self, documents: Iterable[Ids]) -> Header:
        """Everything but the header, which is left to be written when this has reached the disk."""
        self._write_tokens(documents)
        tokens = self._map("tokens", "r")
        counts = np.zeros(self._header.vocab_size, np.int32)
        self._steps.count_entries(tokens, counts)
        self._header = replace(self._header, num_entries=int(counts.sum(dtype=np.int64)))
        if self._header.num_entries == 0:
            raise DatastoreError(_NOTHING)
        self._reserve()
        starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        self._map("starts")[:] = starts
        self._sort(tokens, starts)
        self._link()
        self._grow()
        header = replace(self._header, checksums=tuple(self._checksum(section) for section in self._header.sections))
        self._file.flush()
        os.fsync(self._file.fileno())
        return header

    def _write_tokens(self, documents: Iterable[Ids]) -> None:
        self._file.seek(self._section("tokens").offset)
        separator = np.array([SEPARATOR], "<i4").tobytes()
        self._file.write(separator)
        num_documents, num_tokens = 0, 1
        for document in documents:
            if len(document) == 0:
                continue
            if document.min() < 0 or document.max() >= self._header.vocab_size:
                bad = document.min() if document.min() < 0 else document.max()
                raise DatastoreError(f"Token id {bad} is not in the vocabulary, which has {self._header.vocab_size} tokens.")
            self._file.write(document.astype("<i4", copy=False).tobytes() + separator)
            num_documents += 1
            num_tokens += len(document) + 1
            if num_tokens > MAX_TOKENS:
                raise DatastoreError(f"The input has more than {MAX_TOKENS} tokens: build it in shards.")
        self._header = replace(self._header, num_documents=num_documents, num_tokens=num_tokens)

    def _sort(self, tokens: Tokens, starts: npt.NDArray[np.int64]) -> None:
        """Sort the entries, some last tokens of context at a time."""
        order, followers, shared, samples = (self._map(name) for name in ("order", "followers", "shared", "samples"))
        max_match, vocab_size = self._header.max_match, self._header.vocab_size
        before, low = 0, 0
        with self._progress("sort") as progress:
            while low < vocab_size:
                high = max(low + 1, int(np.searchsorted(starts, starts[low] + _PASS, "right")) - 1)
                first, stop = int(starts[low]), int(starts[high])
                positions, keys = np.empty(stop - first, np.int32), np.empty(stop - first, np.int64)
                self._steps.collect(tokens, low, high, positions)
                self._steps.sort(tokens, positions, keys, max_match, vocab_size)
                self._steps.describe(tokens, positions, before, followers[first:stop], shared[first:stop], max_match)
                order[first:stop] = positions
                sampled = slice(-(-first // SCAN), -(-stop // SCAN))
                self._steps.sample(tokens, positions[-first % SCAN :: SCAN].copy(), samples[sampled], max_match, vocab_size)
                before = int(positions[-1]) if len(positions) else before
                progress.update(stop - first)
                low = high

    def _link(self) -> None:
        """Number the positions of a window by their entry, then look each entry's next position up."""
        order, successors = self._map("order"), self._map("successors")
        successors.fill(NONE)
        windows = range(0, self._header.num_tokens, _WINDOW)
        with self._progress("link", len(windows) * len(order)) as progress:
            for low in windows:
                ranks = np.full(min(_WINDOW, self._header.num_tokens - low), NONE, np.int32)
                self._steps.rank(order, low, ranks)
                self._steps.link(order, low, ranks, successors)
                progress.update(len(order))

    def _grow(self) -> None:
        """Count the nodes, then fill them in."""
        arrays = [self._map(name, "r") for name in ("followers", "successors", "shared")]
        counts, anchors = np.zeros(self._header.vocab_size, np.int32), self._map("anchors")
        anchors.fill(NONE)
        num_nodes = self._steps.grow(*arrays, counts, anchors, np.empty(0, NODE))
        self._header = replace(self._header, num_nodes=num_nodes)
        self._reserve()
        if num_nodes:
            self._steps.grow(*arrays, counts, anchors, self._map("nodes"))

    def _reserve(self) -> None:
        """Have room on the disk for all sections: if a mapped one finds none, the process is killed."""
        self._file.flush()
        os.posix_fallocate(self._file.fileno(), 0, self._header.num_bytes)

    def _section(self, name: str) -> Section:
        return next(section for section in self._header.sections if section.name == name)

    def _map(self, name: str, mode: Literal["r", "r+"] = "r+") -> npt.NDArray[Any]:
        """A section without a copy."""
        self._file.flush()
        section = self._section(name)
        return np.asarray(np.memmap(self._file, section.dtype, mode, section.offset, section.length))

    def _checksum(self, section: Section) -> int:
        return zlib.crc32(self._map(section.name, "r").data) if section.length else 0

    def _progress(self, name: str, total: int | None = None) -> "tqdm[None]":
        total = self._header.num_entries if total is None else total
        return tqdm(total=total, desc=name, unit="token", unit_scale=True, disable=not self._show_progress)
