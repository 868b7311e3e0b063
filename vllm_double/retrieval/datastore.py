"""Retrieval from a static corpus: a file that is built once, mapped by every process of a host, and never written again.

An entry is a token of the corpus that has another before it in its document. The tokens before it are its
context, the token itself is the follower. Entries are sorted by context, read backwards, so those whose context ends
with the same words are neighbours, for every number of words:

- ``tokens``, int32: the documents, with SEPARATOR before, between and behind them;
- ``starts``, int32 [vocab_size + 1]: the first entry whose context ends with each token;
- ``samples``, int64 per SCAN entries: the nearest tokens of every SCANth entry's context, as many as fit, each plus one; a
  search looks at these first, because they lie close together;
- ``order``, int32 per entry: its position in tokens;
- ``followers``, int32 per entry: the token there;
- ``successors``, int32 per entry: the entry of the position behind it, whose context is longer by the follower; NONE at the
  end of a document;
- ``shared``, uint8 per entry: tokens of context that it shares with the entry before it, at most max_match;
- ``anchors``, int32 per SCAN entries: the innermost node around every SCANth entry;
- ``nodes``, int32 [num_nodes, 7]: groups of more than SCAN entries, with their most frequent follower; see `_datastore_steps`.

So a lookup is one binary search and then, per token, a look at a few neighbours (or at one node) and a jump to the
successor. 17.4 bytes per token, and what nodes take. Little-endian; the header is described by _HEADER, and each section begins
at a multiple of 64 bytes. Checksums are zlib.crc32: they find damage, not malice.
"""

import hashlib
import math
import mmap
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval._datastore_steps import (
    COUNT,
    DEPTH,
    FIRST,
    MAX_DEPTH,
    NONE,
    NUM_COLUMNS,
    PARENT,
    SCAN,
    STOP,
    SUCCESSOR,
    TOKEN,
    lookup_step,
)
from vllm_double.retrieval.base import Continuation, Source, Tokens
from vllm_double.retrieval.buffers import MAX_CONTINUATION, Recent, Scratch

__all__ = ["Datastore", "DatastoreError", "DatastoreRetriever", "Header", "Section", "files_of", "fingerprint"]

SEPARATOR = -1
SUFFIX = ".vdd"
"""Of the files in a folder of shards."""
MAX_TOKENS = 2**31 - 1
MAX_VOCAB = 2**31 - 2
_MAGIC = b"VDOUBLE\n"
FORMAT_VERSION = 1
# Magic, version, max_match, vocab_size, documents, tokens, entries, nodes, fingerprint, a checksum per section; then one of
# all that.
_HEADER = struct.Struct("<8sIIIQQQQ32s9I")
_CHECKSUM = struct.Struct("<I")
_ALIGNMENT = 64
_CHUNK = 1 << 22


class DatastoreError(Exception):
    """A file that cannot be used, or an input that none can be built from; the message is a sentence for the operator."""


def fingerprint(vocabulary: Mapping[str, int]) -> bytes:
    """SHA-256 over ids and tokens in the order of ids: what a token id means."""
    digest = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        text = token.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<qq", index, len(text)) + text)
    return digest.digest()


def files_of(path: Path) -> list[Path]:
    """The files of a datastore: itself, or all of a folder. Raises DatastoreError where there is none."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob(f"*{SUFFIX}"))
    if not found:
        raise DatastoreError(f'The folder "{path}" holds no datastore.')
    return found


class Section(NamedTuple):
    """Where an array lies in the file."""

    name: str
    offset: int
    dtype: npt.DTypeLike
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def view(self, file: mmap.mmap) -> npt.NDArray[Any]:
        """The array, read-only and without a copy."""
        return np.frombuffer(file, self.dtype, math.prod(self.shape), self.offset).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What the file says about itself; offsets and sizes follow from it, none is stored."""

    max_match: int
    vocab_size: int
    num_documents: int
    num_tokens: int
    """Elements of ``tokens``: the corpus, and num_documents + 1 separators."""
    num_entries: int
    num_nodes: int
    fingerprint: bytes
    checksums: tuple[int, ...] = (0,) * 9

    @property
    def num_corpus_tokens(self) -> int:
        return self.num_tokens - self.num_documents - 1

    @property
    def sections(self) -> tuple[Section, ...]:
        entries = (self.num_entries,)
        samples = ((self.num_entries + SCAN - 1) // SCAN,)
        shapes: tuple[tuple[str, npt.DTypeLike, tuple[int, ...]], ...] = (
            ("tokens", "<i4", (self.num_tokens,)),
            ("starts", "<i4", (self.vocab_size + 1,)),
            ("samples", "<i8", samples),
            ("order", "<i4", entries),
            ("followers", "<i4", entries),
            ("successors", "<i4", entries),
            ("shared", "u1", entries),
            ("anchors", "<i4", samples),
            ("nodes", "<i4", (self.num_nodes, NUM_COLUMNS)),
        )
        found: list[Section] = []
        end = _HEADER.size + _CHECKSUM.size
        for name, dtype, shape in shapes:
            section = Section(name, (end + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT, dtype, shape)
            found.append(section)
            end = section.offset + section.num_bytes
        return tuple(found)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.sections[-1].offset + self.sections[-1].num_bytes

    def pack(self) -> bytes:
        numbers = (self.max_match, self.vocab_size, self.num_documents, self.num_tokens, self.num_entries, self.num_nodes)
        packed = _HEADER.pack(_MAGIC, FORMAT_VERSION, *numbers, self.fingerprint, *self.checksums)
        return packed + _CHECKSUM.pack(zlib.crc32(packed))

    @classmethod
    def unpack(cls, data: bytes) -> "Header":
        """Raises DatastoreError unless the header is whole and its numbers can belong to a file."""
        if not data.startswith(_MAGIC):
            raise DatastoreError("it is not a datastore, or its build did not end")
        if len(data) < _HEADER.size + _CHECKSUM.size:
            raise DatastoreError("it is cut off inside of the header")
        version = int.from_bytes(data[8:12], "little")
        if version != FORMAT_VERSION:
            raise DatastoreError(f"its format has version {version}; this vllm-double reads version {FORMAT_VERSION}")
        if _CHECKSUM.unpack_from(data, _HEADER.size)[0] != zlib.crc32(data[: _HEADER.size]):
            raise DatastoreError("its header is damaged: the checksum differs")
        _, _, *fields = _HEADER.unpack_from(data)
        header = cls(fields[0], fields[1], fields[2], fields[3], fields[4], fields[5], fields[6], tuple(fields[7:]))
        if not (
            1 <= header.max_match < MAX_DEPTH
            and 1 <= header.vocab_size <= MAX_VOCAB
            and header.num_documents >= 1
            # All tokens are entries but the first of each document.
            and 1 <= header.num_entries == header.num_corpus_tokens - header.num_documents
            and header.num_tokens <= MAX_TOKENS
            and header.num_nodes <= header.num_entries
        ):
            raise DatastoreError("its header contradicts itself")
        return header


def _damaged(section: Section, file: mmap.mmap, checksum: int) -> bool:
    found = 0
    for start in range(section.offset, section.offset + section.num_bytes, _CHUNK):
        found = zlib.crc32(file[start : min(start + _CHUNK, section.offset + section.num_bytes)], found)
    return found != checksum


def _bounds(header: Header) -> dict[str, tuple[Any, Any]]:
    """The least and the greatest number of each section; of nodes, by column."""
    entries, token, node = header.num_entries, header.vocab_size - 1, header.num_nodes - 1
    columns = np.zeros((2, NUM_COLUMNS), np.int64)
    for column, least, greatest in (
        (FIRST, 0, entries - 1), (STOP, 1, entries), (DEPTH, 1, header.max_match), (COUNT, 1, entries), (TOKEN, 0, token),
        (SUCCESSOR, NONE, entries - 1), (PARENT, NONE, node),
    ):  # fmt: skip
        columns[:, column] = least, greatest
    return {
        "tokens": (SEPARATOR, token),
        "starts": (0, entries),
        "samples": (1, 2**63 - 1),
        "order": (2, header.num_tokens - 2),
        "followers": (0, token),
        "successors": (NONE, entries - 1),
        "shared": (0, header.max_match),
        "anchors": (NONE, node),
        "nodes": (columns[0], columns[1]),
    }


def _exceeds(array: npt.NDArray[Any], least: Any, greatest: Any) -> bool:
    parts = (array[start : start + _CHUNK] for start in range(0, len(array), _CHUNK))
    return any(bool((part < least).any() or (part > greatest).any()) for part in parts)


def _innermost(nodes: list[list[int]], first: int, stop: int, depth: int) -> int:
    """The deepest node around entries [first, stop) that is less deep than ``depth``, or NONE."""
    around = [i for i, node in enumerate(nodes) if node[FIRST] <= first and stop <= node[STOP] and node[DEPTH] < depth]
    return max(around, key=lambda i: nodes[i][DEPTH], default=NONE)


class Datastore:
    """A mapped file. Opening reads the header only; whatever the sections hold, a lookup stays inside of them and ends.

    As with any mapped file, cutting it off in place ends the processes that look up in it: replace it, as the builder does.
    """

    def __init__(self, path: Path, tokenizer: bytes | None = None) -> None:
        """Map the file. ``tokenizer`` is the fingerprint that its ids must have; None: any. Raises DatastoreError."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.header = Header.unpack(file.read(_HEADER.size + _CHECKSUM.size))
                size = file.seek(0, 2)
                if size != self.header.num_bytes:
                    raise DatastoreError(f"it has {size} bytes where its header tells of {self.header.num_bytes}")
                if tokenizer is not None and tokenizer != self.header.fingerprint:
                    raise DatastoreError("it was built with another tokenizer")
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DatastoreError(f'The datastore "{path}" cannot be read: {error.strerror}.') from None
        except DatastoreError as error:
            raise DatastoreError(f'The datastore "{path}" cannot be used: {error}.') from None
        self.sections = {section.name: section.view(self._file) for section in self.header.sections}
        words = np.frombuffer(self._file, "<i4")
        self._places = np.array([(section.offset, section.offset + section.num_bytes) for section in self.header.sections])
        # Addresses of what ``_file`` and ``_places`` keep where it is.
        self._file_arguments = words.ctypes.data, len(words), self._places.ctypes.data
        self._max_match = self.header.max_match
        self._lookup = lookup_step()

    def verify(self) -> None:
        """Compare all checksums, and every number with what it can be. Raises DatastoreError that names the bad sections."""
        pairs = zip(self.header.sections, self.header.checksums, strict=True)
        damaged = [section.name for section, checksum in pairs if _damaged(section, self._file, checksum)]
        if damaged:
            raise DatastoreError(f'The datastore "{self.path}" is damaged: the checksum of {", ".join(damaged)} differs.')
        bounds = _bounds(self.header)
        wrong = ", ".join(name for name, array in self.sections.items() if _exceeds(array, *bounds[name]))
        if wrong:
            raise DatastoreError(f'The datastore "{self.path}" is made up: numbers in {wrong} are out of range.')

    def match(self, address: int, num_context: int, scratch: Scratch, max_tokens: int) -> Continuation | None:
        """Continue the context at an address, int32 [num_context] with room for ``max_tokens``; see `DatastoreRetriever`."""
        found = self._lookup(*self._file_arguments, address, num_context, self._max_match, scratch.out_address, max_tokens)
        return scratch.continuation(*found)

    def check_integrity(self) -> None:
        """Raise AssertionError where the sections are not those of the documents. Slow, O(n^2): for tests."""
        lists = [array.tolist() for array in self.sections.values()]
        tokens, starts, samples, order, followers, successors, shared, anchors, nodes = lists
        depth, num_entries = self.header.max_match, self.header.num_entries
        contexts: dict[int, list[int]] = {}
        position = 0
        for document in self.documents():
            position += 1
            for i in range(1, len(document)):
                contexts[position + i] = document[max(0, i - depth) : i][::-1]
            position += len(document)
        assert position + 1 == len(tokens) == self.header.num_tokens
        assert sorted(order) == sorted(contexts), "each token with another before it is an entry"
        ordered = [contexts[position] for position in order]
        assert ordered == sorted(ordered), "entries are sorted by context, read backwards"
        last = [context[0] for context in ordered]
        assert starts == np.searchsorted(last, np.arange(self.header.vocab_size + 1)).tolist()
        assert followers == [tokens[position] for position in order]
        num_bits = self.header.vocab_size.bit_length()
        places = range(63 // num_bits)
        keys = [sum(t + 1 << num_bits * (places[-1] - i) for i, t in zip(places, c, strict=False)) for c in ordered[::SCAN]]
        assert samples == keys
        ranks = {position: entry for entry, position in enumerate(order)}
        assert successors == [ranks.get(position + 1, NONE) for position in order]
        groups: dict[tuple[int, int], int] = {}
        for length in range(1, depth + 1):
            first = 0
            for entry in range(1, num_entries + 1):
                if entry < num_entries and len(ordered[entry]) >= length and ordered[first][:length] == ordered[entry][:length]:
                    assert shared[entry] >= length
                    continue
                assert entry == num_entries or shared[entry] < length
                if entry - first > SCAN and len(ordered[first]) >= length:
                    groups[first, entry] = length
                first = entry
        assert {(node[FIRST], node[STOP]): node[DEPTH] for node in nodes} == groups, "each large group is one node"
        assert len(groups) == len(nodes)
        for node in nodes:
            inside = followers[node[FIRST] : node[STOP]]
            assert node[COUNT] == inside.count(node[TOKEN])
            assert all((inside.count(token), -token) <= (node[COUNT], -node[TOKEN]) for token in set(inside))
            behind = [successors[i] for i in range(node[FIRST], node[STOP]) if followers[i] == node[TOKEN]]
            assert node[SUCCESSOR] in behind and (node[SUCCESSOR] != NONE or set(behind) == {NONE})
            assert node[PARENT] == _innermost(nodes, node[FIRST], node[STOP], node[DEPTH])
        for i, anchor in enumerate(anchors):
            assert anchor == _innermost(nodes, i * SCAN, i * SCAN + 1, depth + 1)

    def documents(self) -> Iterator[list[int]]:
        """The corpus, document by document."""
        tokens = self.sections["tokens"]
        ends = np.flatnonzero(tokens == SEPARATOR)
        for start, end in pairwise(ends):
            yield tokens[start + 1 : end].tolist()


class DatastoreRetriever(Source):
    """Continues a request with what follows the same words in the corpus.

    A lookup answers from one file: that in which the longest suffix of text + tail occurs; of equally long ones that in which
    it occurs most often, then the first. There one step takes as context the longest suffix of text + tail + (tokens returned
    so far), of at most ``max_match`` tokens, that occurs in a document with a token of that document behind it. Its total is
    the number of such occurrences in all documents. It returns the token that followed most often, with that count; of equally
    frequent ones the lowest id. Steps end with ``max_tokens``, or before a context would be shorter than the first one
    (``match_length``). `reference.scan_documents` is the same in a few obvious lines.

    Of each text the last ``max_match`` tokens at least are kept. Not thread-safe. Costs: benchmarks/datastore_bench.py.
    """

    name = "datastore"

    def __init__(self, *datastores: Datastore) -> None:
        """``max_match`` is the greatest of the datastores'."""
        self.max_match = max(datastore.header.max_match for datastore in datastores)
        self._datastores = datastores
        self._requests: dict[int, Recent] = {}
        self._scratch = Scratch()

    def start(self, key: int, tokens: Tokens, tenant: str | None = None) -> None:
        """Begin with a prompt, int32 [n]. ValueError: the key is in use, or a token is negative."""
        if key in self._requests:
            raise ValueError(f"request {key} is started already")
        recent = Recent(self.max_match)
        recent.append(tokens)
        self._requests[key] = recent

    def stop(self, key: int, keep: bool = False) -> None:
        """Forget the request. KeyError: unknown key."""
        del self._requests[key]

    def forget(self) -> None:
        """Nothing is kept of requests that ended."""

    def work(self, budget_tokens: int) -> None:
        """Nothing waits: requests are not indexed."""

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """Append committed tokens. KeyError: unknown key. ValueError: a negative token, none is appended."""
        self._requests[key].append(tokens)

    def lookup(self, key: int, tail: Sequence[int], max_tokens: int) -> Continuation | None:
        """What follows the longest suffix of text + tail; see the class. None: no suffix occurs.

        KeyError: unknown key. ValueError: ``max_tokens`` not between 1 and MAX_CONTINUATION (1024), or a negative token.
        """
        recent = self._requests[key]
        if not 1 <= max_tokens <= MAX_CONTINUATION:
            raise ValueError(f"max_tokens must be between 1 and {MAX_CONTINUATION}, not {max_tokens}")
        num_recent = min(recent.length, self.max_match)
        address, num_context = recent.write_behind(tail, max_tokens) - 4 * num_recent, num_recent + len(tail)
        best, most = self._datastores[0], (0, 0)
        for datastore in self._datastores if len(self._datastores) > 1 else ():
            found = datastore.match(address, num_context, self._scratch, 1)
            if found is not None and (found.match_length, found.totals[0]) > most:
                best, most = datastore, (found.match_length, found.totals[0])
        return best.match(address, num_context, self._scratch, max_tokens)
