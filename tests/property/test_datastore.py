"""The datastore against a scan of its documents, and against files that no builder wrote."""

import os
import random
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.property.test_retrieval_properties import BOUNDS, RANDOM, STREAMS, fibonacci_word
from tests.references.datastore import check_datastore, documents_of
from tests.references.retrieval import scan_documents
from vllm_double.retrieval import Continuation, Datastore, DatastoreError, DatastoreRetriever
from vllm_double.retrieval.datastore import build as builder
from vllm_double.retrieval.datastore.file import Header

VOCAB = 12
TOKENIZER = b"\1" * 32
MUTATIONS = 10_000

CORPORA = st.one_of(
    st.lists(STREAMS, min_size=1, max_size=5),
    # Many short documents, most of which end where others go on.
    st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=60),
)


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    """Corpora of a testable length take several passes, windows and chunks; nothing waits for the disk."""
    with (
        mock.patch.object(builder.os, "fsync"),
        mock.patch.object(builder, "_PASS", 50),
        mock.patch.object(builder, "_WINDOW", 70),
    ):
        yield


def built(path: Path, documents: list[list[int]], max_match: int) -> Datastore:
    builder.build(path, [np.array(document, np.int32) for document in documents], VOCAB, TOKENIZER, max_match)
    return Datastore(path, TOKENIZER)


def continuations(datastore: Datastore, texts: list[list[int]], max_tokens: int) -> list[Continuation | None]:
    retriever = DatastoreRetriever(datastore)
    found = []
    for key, text in enumerate(texts):
        retriever.start(key, np.array(text, np.int32))
        found.append(retriever.lookup(key, [], max_tokens))
    return found


@given(CORPORA, st.data(), BOUNDS)
@settings(max_examples=300, deadline=None)
def test_a_lookup_equals_a_scan(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], data: st.DataObject, max_match: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "looked_up"
    if all(len(document) < 2 for document in documents):
        with pytest.raises(DatastoreError, match="no document of two tokens"):
            built(path, documents, max_match)
        return
    datastore = built(path, documents, max_match)
    assert list(documents_of(datastore)) == [document for document in documents if document]
    document = documents[data.draw(st.integers(0, len(documents) - 1), "document")]
    start = data.draw(st.integers(0, len(document)), "start")
    repeated = document[start : start + data.draw(st.integers(0, 40), "length")]
    contexts = [repeated, repeated[-1:], data.draw(RANDOM, "context"), [*repeated, *data.draw(STREAMS, "tail")]]
    expected = [scan_documents(documents, context, 20, max_match) for context in contexts]
    assert continuations(datastore, contexts, 20) == expected


@given(CORPORA.filter(lambda documents: any(len(document) > 1 for document in documents)), BOUNDS)
@settings(max_examples=200, deadline=None)
def test_the_sections_are_those_of_their_definition(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], max_match: int
) -> None:
    datastore = built(tmp_path_factory.getbasetemp() / "checked", documents, max_match)
    check_datastore(datastore)
    datastore.verify()


def test_a_large_corpus_of_all_kinds_is_looked_up_as_it_is_scanned(tmp_path: Path) -> None:
    # Long enough that most intervals of short contexts are nodes, nested in each other.
    rng = random.Random(0)
    words = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 6))] for _ in range(8)]
    prose = [token for _ in range(600) for token in rng.choices(words, [8, 5, 3, 2, 1, 1, 1, 1])[0]]
    documents = [prose[:900], fibonacci_word(500), [0, 1, 2] * 100, [3] * 200, prose[900:], [0], [3, 3]]
    datastore = built(tmp_path / "store", documents, 32)
    check_datastore(datastore)
    assert datastore.header.num_nodes > 50
    contexts = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 4))] for _ in range(15)]
    for _ in range(40):
        document = rng.choice(documents)
        start = rng.randrange(len(document))
        contexts.append(document[start : start + rng.randrange(1, 40)])
    expected = [scan_documents(documents, context, 16, 32) for context in contexts]
    assert continuations(datastore, contexts, 16) == expected


@settings(deadline=None, max_examples=60)
@given(corpora=st.lists(st.tuples(CORPORA, st.integers(1, 6)), min_size=1, max_size=4), text=STREAMS)
def test_of_several_files_the_best_answers(
    tmp_path_factory: pytest.TempPathFactory, corpora: list[tuple[list[list[int]], int]], text: list[int]
) -> None:
    assume(all(any(len(document) > 1 for document in corpus) for corpus, _ in corpora))
    folder = tmp_path_factory.mktemp("stores")
    stores = [built(folder / str(number), *corpus) for number, corpus in enumerate(corpora)]
    retriever = DatastoreRetriever(*stores)
    retriever.start(0, np.array(text, np.int32))
    found = [scan_documents(corpus, text[-max_match:], 8, max_match) for corpus, max_match in corpora]
    best = max((one for one in found if one is not None), key=lambda one: (one.match_length, one.totals[0]), default=None)
    assert retriever.lookup(0, [], 8) == best


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """Flipped bytes, a cut, or 8-byte integers of the kind that overflows; half of them under a header that fits."""
    data = bytearray(whole)
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    else:
        for _ in range(rng.choice([1, 4, 40])):
            value = rng.choice([rng.getrandbits(64), rng.randrange(300), 2**63 - rng.randrange(9), 2**31 - rng.randrange(9)])
            start = rng.randrange(len(data) // 8) * 8
            data[start : start + 8] = (value % 2**64).to_bytes(8, "little")
    num_header = len(Header.unpack(whole).pack())
    if rng.random() < 0.5:
        data[:num_header] = whole[:num_header][: len(data)]
    return bytes(data)


def test_a_damaged_file_is_refused_or_harmless(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 6))] for _ in range(5)]
    documents = [[token for _ in range(40) for token in rng.choice(words)] for _ in range(3)]
    path = tmp_path / "store"
    assert built(path, documents, 32).header.num_nodes >= 5
    whole = path.read_bytes()
    texts = [documents[0][:40], documents[1][-3:], [5], [1, 1, 1]]
    refused = 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(whole, rng))
        try:
            datastore = Datastore(path, TOKENIZER)
        except DatastoreError:
            refused += 1
            continue
        for found in continuations(datastore, texts, 16):
            if found is not None:
                assert all(0 <= token < VOCAB for token in found.tokens)
                assert all(1 <= count <= total for count, total in zip(found.counts, found.totals, strict=True))
    assert MUTATIONS / 5 < refused < MUTATIONS * 4 / 5


@pytest.mark.parametrize("field", ["max_match", "vocab_size", "num_documents", "num_tokens", "num_entries", "num_nodes"])
def test_a_header_with_a_right_checksum_and_another_number_is_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "store"
    header = built(path, [[0, 1, 2] * 20], 8).header
    whole = path.read_bytes()
    for value in (0, getattr(header, field) + 64, 2**31 - 1, 2**32 - 1):
        numbers = {name: getattr(header, name) for name in header.__slots__} | {field: value}
        changed = Header(**numbers).pack()
        path.write_bytes(changed + whole[len(changed) :])
        try:
            datastore = Datastore(path)
        except DatastoreError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert field in ("max_match", "num_nodes"), "all that sizes depend on"
            continuations(datastore, [[0, 1], [2, 0, 1] * 20], 16)


@pytest.mark.parametrize("value", [-2, 2**31 - 1])
def test_numbers_out_of_range_under_right_checksums_are_found_and_named(tmp_path: Path, value: int) -> None:
    path = tmp_path / "store"
    header = built(path, [[0, 1, 2] * 40], 8).header
    whole = path.read_bytes()
    for index, section in enumerate(header.sections):
        if value > 0 and section.name == "samples":
            continue  # any positive number can be one
        data = bytearray(whole)
        size = np.dtype(section.dtype).itemsize
        end = section.offset + section.num_bytes
        data[end - size : end] = (value % 256**size).to_bytes(size, "little")
        checksums = list(header.checksums)
        checksums[index] = zlib.crc32(data[section.offset : end])
        made_up = replace(header, checksums=tuple(checksums)).pack()
        path.write_bytes(made_up + data[len(made_up) :])
        with pytest.raises(DatastoreError, match=f"numbers in {section.name} are out of range"):
            Datastore(path).verify()


def test_a_lookup_in_a_damaged_file_stays_inside_of_sections(tmp_path: Path) -> None:
    """The mutations once more, with numba's own checks of every index."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    test = f"{__file__}::{test_a_damaged_file_is_refused_or_harmless.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
