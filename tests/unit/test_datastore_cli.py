import errno
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.references.datastore import check_datastore, documents_of
from vllm_double.cli import main
from vllm_double.retrieval import Continuation, Datastore, DatastoreError, DatastoreRetriever
from vllm_double.retrieval.datastore import build as builder
from vllm_double.retrieval.datastore import files_of, fingerprint

WORDS = ["<unk>", "a", "b", "c", "d", "e"]
TOKENIZER = b"\1" * 32


def save_tokenizer(folder: Path, words: list[str]) -> None:
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizers ``same`` and ``other``, which has two words swapped."""
    folder = tmp_path_factory.mktemp("tokenizers")
    save_tokenizer(folder / "same", WORDS)
    save_tokenizer(folder / "other", [*WORDS[:4], "e", "d"])
    return folder


@pytest.fixture
def build(tokenizers: Path, tmp_path: Path) -> Callable[..., int]:
    """Builds tmp_path / store from the inputs."""
    fixed = ["datastore", "build", "--tokenizer", str(tokenizers / "same"), "--output", str(tmp_path / "store"), "--input"]
    return lambda *inputs: main([*fixed, *map(str, inputs)])


def lines(path: Path, *documents: object) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def test_text_token_ids_and_folders_become_documents_in_order(tmp_path: Path, build: Callable[..., int]) -> None:
    mixed = lines(tmp_path / "mixed.jsonl", {"text": "a b c"}, {"token_ids": [4, 5, 4]}, {"token_ids": []}, {"text": "b"})
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "one.txt").write_text("a\nb d\n")
    lines(tmp_path / "folder" / "two.jsonl", {"text": "e e"})
    (tmp_path / "folder" / "skipped.bin").write_bytes(b"\xff")
    assert build(mixed, tmp_path / "folder") == 0
    datastore = Datastore(tmp_path / "store", fingerprint({word: index for index, word in enumerate(WORDS)}))
    assert list(documents_of(datastore)) == [[1, 2, 3], [4, 5, 4], [2], [1, 2, 4], [5, 5]]
    check_datastore(datastore)
    retriever = DatastoreRetriever(datastore)
    retriever.start(0, np.array([1], np.int32))
    assert retriever.lookup(0, [], 4) == Continuation.of([2, 3], 1, [2, 1], [2, 2])


def test_a_long_text_is_cut_at_line_ends(tmp_path: Path, build: Callable[..., int]) -> None:
    (tmp_path / "long.txt").write_text("a b\n" * 3 + "c d")
    with mock.patch("vllm_double.retrieval.datastore.corpus._PIECE", 6):
        assert build(tmp_path / "long.txt") == 0
        assert list(documents_of(Datastore(tmp_path / "store"))) == [[1, 2, 1, 2], [1, 2, 3, 4]]
        (tmp_path / "long.txt").write_text("a " * 10)
        assert build(tmp_path / "long.txt") == 0
        assert list(documents_of(Datastore(tmp_path / "store"))) == [[1] * 6, [1] * 4], "a text without line ends"


def test_inspect_and_verify_tell_what_is_in_the_file(
    tmp_path: Path, tokenizers: Path, build: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    build(lines(tmp_path / "in.jsonl", {"text": "a b c a"}))
    store = str(tmp_path / "store")
    capsys.readouterr()
    assert main(["datastore", "inspect", store]) == 0
    facts = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (facts["format"], facts["documents"], facts["tokens"], facts["vocabulary"]) == ("1", "1", "4", "6")
    assert main(["datastore", "verify", store]) == 0
    assert main(["datastore", "verify", store, "--tokenizer", str(tokenizers / "same")]) == 0
    capsys.readouterr()
    assert main(["datastore", "verify", store, "--tokenizer", str(tokenizers / "other")]) == 1
    assert "it was built with another tokenizer." in capsys.readouterr().err


def test_shards_are_files_of_a_folder_and_no_part_of_one_opens(
    tmp_path: Path, tokenizers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = lines(tmp_path / "in.jsonl", *({"text": text} for text in ("a b c a", "b", "c d", "a b d e", "e")))
    store = tmp_path / "store"
    options = ["datastore", "build", "--tokenizer", str(tokenizers / "same"), "--input", str(text), "--output", str(store)]
    assert main([*options, "--shard-tokens", "0"]) == 1
    assert "A shard has 1 to 1073741823 tokens, not 0" in capsys.readouterr().err
    assert main([*options, "--shard-tokens", "6"]) == 0
    assert [path.name for path in sorted(store.iterdir())] == ["00000.vdd", "00001.vdd"]
    documents = [list(documents_of(Datastore(path))) for path in files_of(store)]
    assert documents == [[[1, 2, 3, 1], [3, 4]], [[1, 2, 4, 5]]]
    capsys.readouterr()
    assert main(["datastore", "verify", str(store), "--tokenizer", str(tokenizers / "same")]) == 0
    assert main(["datastore", "inspect", str(store)]) == 0
    assert capsys.readouterr().out.count("documents") == 2
    assert main([*options, "--shard-tokens", "6"]) == 1
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert main(["datastore", "verify", str(tmp_path / "none")]) == 1
    assert "holds no datastore" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "store", "none"}


def test_what_a_build_of_shards_leaves_when_it_fails_or_is_killed(tmp_path: Path) -> None:
    store, document = tmp_path / "store", np.array([1, 2, 3] * 40, np.int32)
    partial = builder.partial_path(store)

    def killed() -> Iterator[np.ndarray]:
        yield document
        yield document
        os._exit(9)

    child = os.fork()
    if child == 0:
        builder.build_shards(store, killed(), 100, 6, TOKENIZER)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not store.exists()
    assert len(list(partial.iterdir())) == 2
    for path in partial.iterdir():
        with pytest.raises(DatastoreError, match=r"not a datastore|cut off"):
            Datastore(path)
    for documents, size in ([document, np.array([1, 9], np.int32)], 100), ([document[:1]], 100):
        with pytest.raises(DatastoreError, match=r"Token id 9|no document"):
            builder.build_shards(store, documents, size, 6, TOKENIZER)
        assert not any(tmp_path.iterdir())
    builder.build_shards(store, [document] * 3, 100, 6, TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["store"] and len(files_of(store)) == 3


def test_a_folder_of_others_is_in_the_way_and_stays(tmp_path: Path) -> None:
    document = np.array([1, 2], np.int32)
    partial = builder.partial_path(tmp_path / "store")
    (partial / "mine").mkdir(parents=True)
    (partial / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(DatastoreError, match="in the way"):
        builder.build_shards(tmp_path / "store", [document], 100, 6, TOKENIZER)
    assert (partial / "mine" / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("build", [builder.build, lambda output, *rest: builder.build_shards(output, rest[0], 100, *rest[1:])])
def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path, build: Callable[..., object]) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(builder.os, "posix_fallocate", side_effect=full), pytest.raises(OSError, match="No space left"):
        build(tmp_path / "store", [np.array([1, 2, 3] * 40, np.int32)], 6, TOKENIZER)
    assert not any(tmp_path.iterdir())


def test_more_tokens_than_a_file_can_have_are_refused(tmp_path: Path) -> None:
    with mock.patch.object(builder, "MAX_TOKENS", 20), pytest.raises(DatastoreError, match="more than 20 tokens"):
        builder.build(tmp_path / "store", [np.array([1, 2], np.int32)] * 10, 6, TOKENIZER)
    assert not any(tmp_path.iterdir())


def test_a_flipped_bit_in_any_section_is_found_and_named(tmp_path: Path, build: Callable[..., int]) -> None:
    build(lines(tmp_path / "in.jsonl", {"token_ids": [1, 2, 3] * 40}))
    whole = (tmp_path / "store").read_bytes()
    for section in Datastore(tmp_path / "store").header.sections:
        assert section.num_bytes
        data = bytearray(whole)
        data[section.offset + section.num_bytes - 1] ^= 1
        (tmp_path / "flipped").write_bytes(data)
        with pytest.raises(DatastoreError, match=f"the checksum of {section.name} differs"):
            Datastore(tmp_path / "flipped").verify()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "line 1 is not JSON"),
        (b'{"text": "a b"}\n[' + b"[" * 100_000, "line 2 is not JSON"),
        (b'{"text": "\xff"}', "line 1 is not JSON"),
        (b"[1]", 'has not one of "text" and "token_ids"'),
        (b'{"text": "a", "token_ids": [1]}', 'has not one of "text" and "token_ids"'),
        (b'{"text": 1}', 'has a "text" that is no string'),
        (b'{"text": "a \\ud800"}', 'has a "text" that is not Unicode'),
        (b'{"token_ids": [1, true]}', '"token_ids" that are not a list of token ids'),
        (b'{"token_ids": [-1]}', '"token_ids" that are not a list of token ids'),
        (b'{"token_ids": [1, 6]}', "Token id 6 is not in the vocabulary, which has 6 tokens"),
        (b'{"text": "a"}', "no document of two tokens"),
        (b"", "no document of two tokens"),
    ],
)
def test_bad_input_is_refused_with_a_sentence_and_leaves_no_file(
    tmp_path: Path, build: Callable[..., int], capsys: pytest.CaptureFixture[str], content: bytes, reason: str
) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    assert build(tmp_path / "in.jsonl") == 1
    assert reason in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_other_mistakes_are_refused_with_a_sentence(
    tmp_path: Path, tokenizers: Path, build: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    text = lines(tmp_path / "in.jsonl", {"text": "a b"})
    tokenizer = str(tokenizers / "same")
    options = ["datastore", "build", "--input", str(text), "--output"]
    deep = [*options, str(tmp_path / "store"), "--tokenizer", tokenizer, "--max-match", "256"]
    for call, reason in (
        (lambda: build(tmp_path / "missing"), "does not exist"),
        (lambda: build(tmp_path / "empty"), "holds no .jsonl and no .txt file"),
        (lambda: build(tmp_path / "latin.txt"), "is not UTF-8 text"),
        (lambda: main([*options, str(tmp_path / "store"), "--tokenizer", str(tmp_path / "empty")]), "The tokenizer"),
        (lambda: main([*options, str(tmp_path / "no" / "store"), "--tokenizer", tokenizer]), "No such file or directory"),
        (lambda: main([*options, str(tmp_path / "empty"), "--tokenizer", tokenizer]), "is a folder"),
        (
            lambda: main(deep),
            "Contexts have 1 to 255",
        ),
        (lambda: main(["datastore", "verify", str(tmp_path / "missing")]), "No such file or directory"),
        (lambda: main(["datastore", "inspect", str(text)]), "is not a datastore"),
    ):
        assert call() == 1
        assert reason in capsys.readouterr().err.splitlines()[-1]


def test_what_is_no_datastore_is_never_replaced(
    tmp_path: Path, build: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    store, partial = tmp_path / "store", tmp_path / "store.partial"
    source = lines(tmp_path / "in.jsonl", {"text": "a b c"})

    def check(path: Path) -> None:
        before = path.lstat().st_mode, path.stat().st_size
        assert build(source) == 1
        assert "exists and is not a datastore: it is not replaced." in capsys.readouterr().err.splitlines()[-1]
        assert (path.lstat().st_mode, path.stat().st_size) == before
        assert source.read_text() == '{"text": "a b c"}\n'

    for path in (store, partial):
        for make in (path.hardlink_to, path.symlink_to, lambda _, path=path: os.mkfifo(path)):
            make(source)  # the input itself by another name, or a pipe
            check(path)
            path.unlink()
    store.touch()
    check(store)
    store.unlink()
    assert not partial.exists()

    assert build(source) == 0
    whole = store.read_bytes()
    for left in (b"", bytes(100), whole[:100]):  # by a build that was killed, or on another machine
        partial.write_bytes(left)
        store.write_bytes(whole[:-1])
        assert build(source) == 0
        assert store.read_bytes() == whole
        assert not partial.exists()


def test_a_build_called_as_a_function_replaces_no_other_file_either(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.write_text("of somebody's")
    with pytest.raises(DatastoreError, match="is not a datastore: it is not replaced"):
        builder.build(store, [np.arange(4, dtype=np.int32)], 8, bytes(32))
    assert store.read_text() == "of somebody's"


def test_a_cut_or_foreign_file_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "store"
    builder.build(path, [np.array([1, 2, 1, 2], np.int32)], 6, TOKENIZER)
    whole = path.read_bytes()
    for data, reason in (
        (b"", "is not a datastore"),
        (whole[:50], "cut off inside of the header"),
        (whole[:-1], f"has {len(whole) - 1} bytes, and {len(whole)} by its header"),
        (whole + b"\0", f"has {len(whole) + 1} bytes"),
        (whole[:8] + b"\2" + whole[9:], "its format has version 2"),
        (whole[:40] + b"\xff" + whole[41:], "its header is damaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(DatastoreError, match=reason):
            Datastore(path)


class DyingFile(io.BufferedRandom):
    """A file whose process ends in the middle of a write."""

    writes_left = 0

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if DyingFile.writes_left == 0:
            data = bytes(data)
            super().write(data[: len(data) // 2])
            self.flush()
            os._exit(9)
        DyingFile.writes_left -= 1
        return super().write(data)


def dying_map(self: builder._Builder, name: str, mode: Literal["r", "r+"] = "r+") -> npt.NDArray[Any]:
    """Map a section, or end the process instead."""
    if DyingFile.writes_left == 0:
        os._exit(9)
    DyingFile.writes_left -= 1
    return MAP(self, name, mode)


MAP = builder._Builder._map


def build_and_die(output: Path, documents: list[np.ndarray], num_writes: int) -> bool:
    """Build in a process that ends after so many writes and maps, or before the new name; whether it was in one of them."""
    child = os.fork()
    if child == 0:
        DyingFile.writes_left = num_writes
        with (
            mock.patch.object(builder.os, "fdopen", lambda descriptor, mode: DyingFile(io.FileIO(descriptor, mode))),
            mock.patch.object(Path, "replace", side_effect=lambda _: os._exit(8)),
            mock.patch.object(builder._Builder, "_map", dying_map),
        ):
            try:
                builder.build(output, documents, 6, TOKENIZER)
            finally:
                os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (8, 9)
    return code == 9


def test_a_build_that_is_killed_at_any_write_leaves_the_old_file_and_nothing_else_that_opens(tmp_path: Path) -> None:
    output = tmp_path / "store"
    documents = [np.array([1, 2, 3] * 40, np.int32), np.array([4, 5], np.int32)]
    num_writes = 0
    while True:
        in_a_write = build_and_die(output, documents, num_writes)
        assert not output.exists()
        if not in_a_write:
            Datastore(builder.partial_path(output)).verify()  # all but its name is there
            break
        with pytest.raises(DatastoreError, match=r"not a datastore|cut off|damaged"):
            Datastore(builder.partial_path(output))
        num_writes += 1
    assert num_writes >= 12
    builder.build(output, documents[1:], 6, TOKENIZER)
    assert list(tmp_path.iterdir()) == [output], "what a killed build left is cleared by the next"
    assert build_and_die(output, documents, num_writes // 2)
    assert list(documents_of(Datastore(output))) == [[4, 5]]
    builder.build(output, documents, 6, TOKENIZER)
    assert Datastore(output).header.num_documents == 2
    assert list(tmp_path.iterdir()) == [output]


def test_two_builds_of_one_file_do_not_mix(tmp_path: Path) -> None:
    output = tmp_path / "store"

    def documents():  # type: ignore[no-untyped-def]
        yield np.array([1, 2], np.int32)
        with pytest.raises(DatastoreError, match="Another build is writing"):
            builder.build(output, [np.array([3, 4], np.int32)], 6, TOKENIZER)
        yield np.array([2, 1], np.int32)

    builder.build(output, documents(), 6, TOKENIZER)
    assert list(documents_of(Datastore(output))) == [[1, 2], [2, 1]]


def test_misuse_of_the_retriever_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    builder.build(tmp_path / "store", [np.array([1, 2, 3, 4], np.int32)], 6, TOKENIZER)
    retriever = DatastoreRetriever(Datastore(tmp_path / "store"))
    retriever.start(7, np.array([1, 2], np.int32))
    for call in (
        lambda: retriever.start(7, np.array([1], np.int32)),
        lambda: retriever.start(8, np.array([1, -1], np.int32)),
        lambda: retriever.extend(7, [4, -1]),
        lambda: retriever.lookup(7, [], 0),
        lambda: retriever.lookup(7, [], 1025),
    ):
        with pytest.raises(ValueError, match=r"must|cannot|already"):
            call()
    assert retriever.lookup(7, [], 2) == Continuation.of([3, 4], 2, [1, 1], [1, 1])
    for call in (
        lambda: retriever.extend(8, [1]),
        lambda: retriever.lookup(8, [], 1),
        lambda: retriever.stop(8),
    ):
        with pytest.raises(KeyError):
            call()


def test_a_request_matches_the_end_of_what_is_left_of_its_text(tmp_path: Path) -> None:
    builder.build(tmp_path / "store", [np.array([1, 2, 3, 4, 5, 1, 3, 5], np.int32)], 6, TOKENIZER, 3)
    retriever = DatastoreRetriever(Datastore(tmp_path / "store"))
    retriever.start(0, np.array([5, 5, 5, 1, 2], np.int32))
    assert retriever.lookup(0, [3], 1) == Continuation.of([4], 3, [1], [1])
    retriever.extend(0, [0, 3])
    assert retriever.lookup(0, [], 1) == Continuation.of([4], 1, [1], [2])
    retriever.extend(0, np.array([2, 3, 4], np.int32))
    assert retriever.lookup(0, [], 1) == Continuation.of([5], 3, [1], [1])
    assert retriever.lookup(0, [6], 1) is None, "it is not in the vocabulary"
