"""Retrieval from a static corpus: a file that is built once, read by every process of a host, and never written again.

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
- ``nodes``, seven int32 each: groups of more than SCAN entries, with their most frequent follower; see `lookup_steps.NODE`.

So a lookup is one binary search and then, per token, a look at a few neighbours (or at one node) and a jump to the
successor. 17.4 bytes per token, and what nodes take. Little-endian; the header is described by _HEADER, and each section begins
at a multiple of 64 bytes. Checksums are zlib.crc32: they find damage, not malice.
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_double.retrieval.datastore.lookup_steps import MAX_DEPTH, NONE, SCAN, SECTION_DTYPES, Sections
from vllm_double.retrieval.datastore.reader import Reader, stamp_of

__all__ = ["Datastore", "DatastoreError", "Header", "Section", "files_of", "fingerprint"]

SEPARATOR = -1
SUFFIX = ".vdd"
"""Of the files in a folder of shards."""
MAX_TOKENS = 2**31 - 1
MAX_VOCAB = 2**31 - 2
MAGIC = b"VDOUBLE\n"
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
    """The files of a datastore: itself, or all of a folder. Raises DatastoreError if there is none."""
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
    length: int

    @property
    def num_bytes(self) -> int:
        return self.length * np.dtype(self.dtype).itemsize


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
        entries, samples = self.num_entries, -(-self.num_entries // SCAN)
        lengths = (self.num_tokens, self.vocab_size + 1, samples, *(entries,) * 4, samples, self.num_nodes)
        found: list[Section] = []
        end = _HEADER.size + _CHECKSUM.size
        for name, dtype, length in zip(Sections._fields, SECTION_DTYPES, lengths, strict=True):
            section = Section(name, -(-end // _ALIGNMENT) * _ALIGNMENT, dtype, length)
            found.append(section)
            end = section.offset + section.num_bytes
        return tuple(found)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.sections[-1].offset + self.sections[-1].num_bytes

    def pack(self) -> bytes:
        numbers = (self.max_match, self.vocab_size, self.num_documents, self.num_tokens, self.num_entries, self.num_nodes)
        packed = _HEADER.pack(MAGIC, FORMAT_VERSION, *numbers, self.fingerprint, *self.checksums)
        return packed + _CHECKSUM.pack(zlib.crc32(packed))

    @classmethod
    def unpack(cls, data: bytes) -> "Header":
        """Raises DatastoreError unless the header is whole and its numbers can belong to a file."""
        if not data.startswith(MAGIC):
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


def _bounds(header: Header) -> dict[str, tuple[int, int]]:
    """The least and the greatest number of each section, and of each field of nodes."""
    entries, token, node = header.num_entries, header.vocab_size - 1, header.num_nodes - 1
    return {
        "tokens": (SEPARATOR, token),
        "starts": (0, entries),
        "samples": (1, 2**63 - 1),
        "order": (2, header.num_tokens - 2),
        "followers": (0, token),
        "successors": (NONE, entries - 1),
        "shared": (0, header.max_match),
        "anchors": (NONE, node),
        "first": (0, entries - 1),
        "stop": (1, entries),
        "depth": (1, header.max_match),
        "parent": (NONE, node),
        "token": (0, token),
        "count": (1, entries),
        "successor": (NONE, entries - 1),
    }


def _exceeds(name: str, array: npt.NDArray[Any], bounds: dict[str, tuple[int, int]]) -> bool:
    if array.dtype.names:
        return any(_exceeds(field, array[field], bounds) for field in array.dtype.names)
    least, greatest = bounds[name]
    return bool((array < least).any() or (array > greatest).any())


class Datastore:
    """An open file. Opening reads the header only; whatever the sections hold, a lookup stays inside of them and ends.

    A file that is changed in place is not read any more: see `reader`. Replace it, as the builder does, and start again.
    """

    def __init__(self, path: Path, tokenizer: bytes | None = None) -> None:
        """Open the file. ``tokenizer`` is the fingerprint that its ids must have; None: any. Raises DatastoreError."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                stamp = stamp_of(self._fd)
                self.header = header = Header.unpack(os.pread(self._fd, _HEADER.size + _CHECKSUM.size, 0))
                if stamp[0] != header.num_bytes:
                    raise DatastoreError(f"it has {stamp[0]} bytes, and {header.num_bytes} by its header")
                if tokenizer is not None and tokenizer != header.fingerprint:
                    raise DatastoreError("it was built with another tokenizer")
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise DatastoreError(f'The datastore "{path}" cannot be read: {error.strerror}.') from None
        except DatastoreError as error:
            raise DatastoreError(f'The datastore "{path}" cannot be used: {error}.') from None
        sections = header.sections
        self.reader = Reader(self._fd, stamp, [s.offset for s in sections], [s.length for s in sections])

    def parts(self, section: Section) -> Iterator[npt.NDArray[Any]]:
        """The section's items, in arrays of some millions; of a file that was cut off those that are left."""
        size = np.dtype(section.dtype).itemsize
        for start in range(0, section.length, _CHUNK):
            num_bytes = size * min(_CHUNK, section.length - start)
            data = os.pread(self._fd, num_bytes, section.offset + size * start)
            yield np.frombuffer(data, section.dtype, len(data) // size)

    def verify(self) -> None:
        """Compare all checksums, and every number with what it can be. Raises DatastoreError that names the bad sections."""
        damaged, wrong, bounds = [], [], _bounds(self.header)
        for section, expected in zip(self.header.sections, self.header.checksums, strict=True):
            checksum, exceeds = 0, False
            for part in self.parts(section):
                checksum = zlib.crc32(part.data, checksum)
                exceeds |= _exceeds(section.name, part, bounds)
            if checksum != expected:
                damaged.append(section.name)
            elif exceeds:
                wrong.append(section.name)
        if damaged:
            raise DatastoreError(f'The datastore "{self.path}" is damaged: the checksum of {", ".join(damaged)} differs.')
        if wrong:
            raise DatastoreError(f'The datastore "{self.path}" is made up: numbers in {", ".join(wrong)} are out of range.')
