"""What context retrieval costs on one core: python -m benchmarks.retrieval_bench

Text: the words of Python's standard library, one id each (repetitive, as code is); the same words shuffled
(hardly repetitive); a loop of 7 tokens such as a model falls into (as repetitive as can be).

Then the same beside the suffix cache of vLLM's method "suffix", where arctic-inference is installed
(scripts/install-suffix.sh), as vLLM sets it up: one request of a million tokens, each in a process of its own,
whose growth is the memory.
"""

import re
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.stats import first_difference
from vllm_double.retrieval import ContextRetriever, Tokens
from vllm_double.retrieval.automaton import warm_up
from vllm_double.retrieval.reference import scan

CONTEXTS = (1024, 16 * 1024, 128 * 1024)
CALLS = 2000
SLICE = 512
MAX_TOKENS = 16
TAIL = 8
PROMPT = 1_000_000
SUFFIX_DEPTH = 24  # vLLM's default, and the most that it asks with


def standard_library_tokens(num_tokens: int) -> Tokens:
    """Words, spaces and signs of the library's files in name order, numbered as they appear. int32 [n]."""
    ids: dict[str, int] = {}
    tokens: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        words = re.findall(r"\w+|\s+|[^\w\s]", path.read_text(encoding="utf-8", errors="replace"))
        tokens += [ids.setdefault(word, len(ids)) for word in words]
        if len(tokens) >= num_tokens:
            return np.array(tokens[:num_tokens], np.int32)
    raise ValueError(f"the standard library has only {len(tokens)} tokens")


def texts(num_tokens: int) -> dict[str, Tokens]:
    """Name and tokens of each kind of text."""
    code = standard_library_tokens(num_tokens)
    return {
        "code": code,
        "shuffled": np.random.default_rng(0).permutation(code),
        "loop": np.resize(np.arange(7, dtype=np.int32), num_tokens),
    }


def quantiles(call: Callable[[int], object], calls: int = CALLS) -> str:
    """Microseconds of call(0), call(1), ...: p50, p99, max."""
    clock = time.perf_counter_ns
    spent = np.empty(calls)
    for i in range(calls):
        begin = clock()
        call(i)
        spent[i] = clock() - begin
    p50, p99 = np.quantile(spent, [0.5, 0.99]) / 1e3
    return f"{p50:6.2f} {p99:7.2f} {spent.max() / 1e3:8.1f}"


def check(text: Tokens) -> None:
    """Refuse to time what is wrong."""
    retriever = ContextRetriever()
    retriever.start(0, text)
    retriever.work(len(text))
    for tail in ([], text[100:108].tolist()):
        expected = scan(text.tolist(), len(text), tail, MAX_TOKENS, retriever.max_match)
        assert retriever.lookup(0, tail, MAX_TOKENS) == expected


def measure(name: str, text: Tokens, context: int) -> None:
    """Print one row: index ``context`` tokens, then look up and extend by what follows in the text."""
    retriever = ContextRetriever()
    retriever.start(0, text[:context])
    bulk = quantiles(lambda _: retriever.work(SLICE), context // SLICE)
    automaton = retriever._requests[0].automaton
    used, reserved = automaton.num_bytes
    following = text[context:].tolist()
    feed = np.array(following[:TAIL], np.int32)
    compiled = quantiles(lambda i: automaton.match(feed, TAIL, True, MAX_TOKENS))
    bare = quantiles(lambda i: retriever.lookup(0, (), MAX_TOKENS))
    tailed = quantiles(lambda i: retriever.lookup(0, following[i : i + TAIL], MAX_TOKENS))
    single = quantiles(lambda i: retriever.extend(0, following[i : i + 1]))
    print(
        f"{name:9} {context:7} | {bulk} | {single} | {compiled} | {bare} | {tailed}"
        f" | {used / context:6.1f} {reserved / context:6.1f}"
    )


def doubling(text: Tokens) -> float:
    """Microseconds of the one `extend` that finds no room in the largest context."""
    retriever = ContextRetriever()
    retriever.start(0, text[: max(CONTEXTS) - 1])
    retriever.work(max(CONTEXTS))
    retriever.extend(0, [0])
    begin = time.perf_counter_ns()
    retriever.extend(0, [0])
    return (time.perf_counter_ns() - begin) / 1e3


class Ours:
    """One request in our retriever."""

    def __init__(self) -> None:
        warm_up()
        self._retriever = ContextRetriever()

    def start(self, prompt: Tokens) -> None:
        self._retriever.start(0, prompt)
        self._retriever.work(len(prompt))

    def append(self, token: int) -> None:
        self._retriever.extend(0, [token])

    def continue_from(self, last: Tokens) -> list[int]:
        found = self._retriever.lookup(0, (), MAX_TOKENS)
        return [] if found is None else found.tokens


class Arctic:
    """One request in the suffix cache of arctic-inference."""

    def __init__(self) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self._cache: Any = SuffixDecodingCache(max_tree_depth=SUFFIX_DEPTH, max_cached_requests=10_000)

    def start(self, prompt: Tokens) -> None:
        self._cache.start_request(0, prompt)

    def append(self, token: int) -> None:
        self._cache.add_active_response(0, [token])

    def continue_from(self, last: Tokens) -> list[int]:
        return list(self._cache.speculate(0, last, max_spec_tokens=MAX_TOKENS).token_ids)


def beside(kind: type[Ours] | type[Arctic], text: Tokens) -> str:
    """Figures of a prompt of PROMPT tokens, and then of appending and continuing by turns."""
    one, memory, clock = kind(), psutil.Process().memory_info, time.perf_counter_ns
    resident, begin = memory().rss, clock()
    one.start(text[:PROMPT])
    prompt_us, grown = (clock() - begin) / 1e3 / PROMPT, memory().rss - resident
    spent, num_right = np.empty((2, CALLS)), 0
    for i in range(CALLS):
        end = PROMPT + i + 1
        token, last = int(text[end - 1]), text[end - SUFFIX_DEPTH : end]
        begin = clock()
        one.append(token)
        middle = clock()
        found = one.continue_from(last)
        spent[:, i] = middle - begin, clock() - middle
        difference = first_difference(found, text[end : end + len(found)].tolist())
        num_right += len(found) if difference is None else difference
    append, lookup = (f"{p50:6.2f} {p99:7.2f}" for p50, p99 in np.quantile(spent, [0.5, 0.99], axis=1).T / 1e3)
    return f"{prompt_us:17.2f} | {append} | {lookup} | {num_right / CALLS:12.2f} | {grown / PROMPT:13.0f}"


def compare() -> None:
    """Print a table of our retriever and, where it is installed, the suffix cache."""
    kinds: list[type[Ours] | type[Arctic]] = [Ours, Arctic] if find_spec("arctic_inference") is not None else [Ours]
    print(f"\nA prompt of {PROMPT} tokens; microseconds")
    print(f"{'text':9} {'':7} | a token of prompt | {'append p50 p99':>14} | {'continue':>14} | right tokens | bytes a token")
    for name, text in texts(PROMPT + CALLS + MAX_TOKENS).items():
        for kind in kinds:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                print(f"{name:9} {kind.__name__.lower():7} | {pool.submit(beside, kind, text).result()}", flush=True)


def main() -> None:
    """Print two tables."""
    begin = time.perf_counter()
    warm_up()
    print(f"warm_up {time.perf_counter() - begin:.2f} s; microseconds, calls through Python: p50 p99 max")
    print(
        f"{'text':9} {'context':>7} | {f'index {SLICE} tokens':>23} | {'extend by 1 token':>23}"
        f" | {'compiled lookup':>23} | {'lookup, no tail':>23}"
        f" | {f'lookup, tail {TAIL}':>23} | bytes/token used, reserved"
    )
    for name, text in texts(max(CONTEXTS) + CALLS + TAIL).items():
        check(text[:2000])
        for context in CONTEXTS:
            measure(name, text, context)
        print(f"{name:9} the token that doubles a context of {max(CONTEXTS)}: {doubling(text):.0f} us")
    compare()


if __name__ == "__main__":
    main()
