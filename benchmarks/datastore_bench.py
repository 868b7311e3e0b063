"""What a datastore costs: python -m benchmarks.datastore_bench

Corpus: copies of Python's standard library, one id per word, in documents of 2,000 tokens, in each of which a tenth of the
tokens is replaced by others of the same text. Lookups continue contexts of one more such copy. Every lookup goes through
Python, the pages of the file are in memory, and 16 tokens are asked for, 8 of the context are a tail.

Beside it the command line: `vllm-double datastore build` from as many tokens of text, in a process of its own.
"""

import argparse
import gc
import itertools
import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import rows, workload
from benchmarks.retrieval_bench import MAX_TOKENS, TAIL, standard_library_tokens
from benchmarks.stats import quantile, quiet_median
from tests.references.retrieval import scan_documents
from vllm_double.retrieval import Datastore, DatastoreRetriever, Found, Queries, Tokens
from vllm_double.retrieval.datastore.build import build
from vllm_double.retrieval.datastore.build_steps import build_steps
from vllm_double.retrieval.datastore.lookup_steps import lookup_steps

DOCUMENT = 2000
REPLACED = 0.1
LOOKUPS = 20_000
WARM_UP = 20_000
TOKENIZER = bytes(32)
STDLIB = Path(sysconfig.get_paths()["stdlib"])
BYTES_PER_TOKEN = 3  # of the bundled tokenizer, about


def copy_of(text: Tokens, rng: np.random.Generator) -> Tokens:
    """The text with some tokens replaced. int32 [n]."""
    replaced = rng.random(len(text)) < REPLACED
    changed = text.copy()
    changed[replaced] = rng.choice(text, int(replaced.sum()))
    return changed


def corpus(text: Tokens, num_tokens: int) -> Iterator[Tokens]:
    """Documents with so many tokens in all."""
    rng = np.random.default_rng(0)
    while num_tokens > 0:
        copy = copy_of(text, rng)[:num_tokens]
        num_tokens -= len(copy)
        yield from np.split(copy, range(DOCUMENT, len(copy), DOCUMENT))


def check(text: Tokens, folder: Path) -> None:
    """Refuse to time what is wrong."""
    documents = [document[:300] for document in corpus(text[:20_000], 20_000)]
    build(folder / "checked", documents, int(text.max()) + 1, TOKENIZER)
    retriever = DatastoreRetriever(Datastore(folder / "checked"))
    for key, document in enumerate(documents):
        context = document[100:120]
        retriever.start(key, context)
        expected = scan_documents([part.tolist() for part in documents], context.tolist(), MAX_TOKENS, retriever.max_match)
        assert retriever.lookup(key, (), MAX_TOKENS) == expected


def lookups(datastore: Datastore, text: Tokens) -> tuple[list[float], list[int], list[int]]:
    """Microseconds of each lookup, how many tokens it found, and the lengths of matches."""
    rng = np.random.default_rng(1)
    text = copy_of(text, rng)
    retriever = DatastoreRetriever(datastore)
    spent: list[float] = []
    num_found: list[int] = []
    matches: list[int] = []
    found = Found.empty(1, MAX_TOKENS)
    gc.disable()
    for end in rng.integers(64, len(text), WARM_UP + LOOKUPS).tolist():
        retriever.start(0, text[end - 64 : end - TAIL])
        queries = Queries.of([0], [text[end - TAIL : end].tolist()], [MAX_TOKENS])
        begin = time.perf_counter_ns()
        retriever.lookup_many(queries, found)
        spent.append((time.perf_counter_ns() - begin) / 1e3)
        num_found.append(int(found.lengths[0]))
        if (one := retriever.lookup(0, queries.tails[0].tolist(), 1)) is not None:
            matches.append(one.match_length)
        retriever.stop(0)
    gc.enable()
    return spent[WARM_UP:], num_found, matches


def measure(text: Tokens, num_tokens: int, path: Path) -> dict[str, rows.Value]:
    """Build, open, look up: one row."""
    build_steps()
    begin = time.perf_counter()
    header = build(path, corpus(text, num_tokens), int(text.max()) + 1, TOKENIZER)
    built = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lookup_steps()
    opening = []
    for _ in range(20):
        opened = time.perf_counter()
        datastore = Datastore(path, TOKENIZER)
        opening.append(1e3 * (time.perf_counter() - opened))
    spent, num_found, matches = lookups(datastore, text)
    return {
        "tokens": num_tokens,
        "build_s": built - begin,
        "peak_mib": peak,
        "open_max_ms": max(opening),
        "bytes_per_token": header.num_bytes / num_tokens,
        "lookup_quiet_us": quiet_median(spent),
        "lookup_p50_us": quantile(spent, 0.5),
        "lookup_p99_us": quantile(spent, 0.99),
        "lookup_max_us": max(spent),
        "mean_found": sum(num_found) / len(num_found),
        "mean_match": sum(matches) / len(matches),
    }


def build_from_text(num_tokens: int, folder: Path) -> dict[str, rows.Value]:
    """What the command takes with the files of the standard library, over and over, as a .jsonl file."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(STDLIB.glob("*.py"))]
    num_left = BYTES_PER_TOKEN * num_tokens
    with (folder / "corpus.jsonl").open("w") as file:
        for text in itertools.cycle(texts):
            if num_left <= 0:
                break
            num_left -= file.write(json.dumps({"text": text}) + "\n")
    command = [sys.executable, "-m", "vllm_double.cli", "datastore", "build", "--tokenizer", str(workload.TARGET)]
    command += ["--input", str(folder / "corpus.jsonl"), "--output", str(folder / "text")]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    return {
        "text_tokens": Datastore(folder / "text").header.num_corpus_tokens,
        "text_build_s": seconds,
        "text_peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def main() -> None:
    """Prints a table and appends one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "datastore.csv")
    options = parser.parse_args()
    text = standard_library_tokens(1_400_000)
    with tempfile.TemporaryDirectory() as folder:
        check(text, Path(folder))
        row = measure(text, options.tokens, Path(folder) / "store")
        row |= build_from_text(options.tokens, Path(folder))
    for name, value in row.items():
        print(f"{name:16} {value:12.2f}")
    rows.append(options.output, row | rows.provenance("benchmarks.datastore_bench"))


if __name__ == "__main__":
    main()
