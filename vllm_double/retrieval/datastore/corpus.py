"""What a datastore is built from: text and token ids in files, read as a stream."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from vllm_double.retrieval.datastore.file import DatastoreError

__all__ = ["load_tokenizer", "read_documents"]

Document = str | npt.NDArray[np.int64]

# Text that is tokenized at once, in characters: enough for all cores.
_BATCH = 1 << 20
# Characters of a text file that are one document; the rest of the line is added, up to as many.
_PIECE = 1 << 20


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, as vLLM loads it. Raises DatastoreError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a loader of foreign files can raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatastoreError(f'The tokenizer "{name}" cannot be read: {reason}') from None


def read_documents(inputs: Iterable[Path], tokenizer: Any, show_progress: bool = False) -> Iterator[npt.NDArray[np.int64]]:
    """Token ids of each document. Raises DatastoreError if an input cannot be read.

    A line of a .jsonl file is a document, {"text": ...} or {"token_ids": [...]}. Every other file is one document of text; a
    long one is cut about every million characters, at a line end if there is one. Of a folder all .jsonl and .txt files are
    read, in the order of their names.
    """
    files = [file for path in inputs for file in _files(path)]
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc="read", unit="B", unit_scale=True, disable=not show_progress) as progress:
        waiting: list[Document] = []
        size = 0
        for file in files:
            for num_bytes, document in _read(file):
                waiting.append(document)
                size += len(document)
                progress.update(num_bytes)
                if size >= _BATCH:
                    yield from _encoded(waiting, tokenizer)
                    waiting, size = [], 0
        yield from _encoded(waiting, tokenizer)


def _encoded(documents: list[Document], tokenizer: Any) -> Iterator[npt.NDArray[np.int64]]:
    texts = [document for document in documents if isinstance(document, str)]
    # verbose: no warning about texts that are longer than a model's context.
    found = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
    for document in documents:
        yield np.array(next(found), np.int64) if isinstance(document, str) else document


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not os.access(path, os.R_OK):
            raise DatastoreError(f'The input "{path}" {"cannot be read" if path.exists() else "does not exist"}.')
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".txt") and file.is_file())
    if not found:
        raise DatastoreError(f'The folder "{path}" holds no .jsonl and no .txt file.')
    return found


def _read(path: Path) -> Iterator[tuple[int, Document]]:
    """(bytes read, document) of each document."""
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield len(line), _parsed(line, f'"{path}", line {number}')
        return
    with path.open(encoding="utf-8", newline="") as file:
        try:
            while text := file.read(_PIECE):
                text += file.readline(_PIECE)
                yield len(text.encode()), text
        except UnicodeDecodeError:
            raise DatastoreError(f'The input "{path}" is not UTF-8 text.') from None


def _parsed(line: bytes, place: str) -> Document:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise DatastoreError(f"The input {place} is not JSON.") from None
    if not isinstance(fields, dict) or ("text" in fields) == ("token_ids" in fields):
        raise DatastoreError(f'The input {place} has not one of "text" and "token_ids".')
    if "text" in fields:
        text = fields["text"]
        if not isinstance(text, str):
            raise DatastoreError(f'The input {place} has a "text" that is no string.')
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can name halves of characters
            raise DatastoreError(f'The input {place} has a "text" that is not Unicode.') from None
        return text
    ids = fields["token_ids"]
    if not isinstance(ids, list) or any(type(token) is not int or not 0 <= token < 2**31 for token in ids):
        raise DatastoreError(f'The input {place} has "token_ids" that are not a list of token ids.')
    return np.array(ids, np.int64)
