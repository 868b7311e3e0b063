"""What context and history retrieval cost on one core: python -m benchmarks.retrieval_bench

Text: the words of Python's standard library, one id each (repetitive, as code is); the same words shuffled
(hardly repetitive); a loop of 7 tokens such as a model falls into (as repetitive as can be).

Then the same beside the suffix cache of vLLM's method "suffix", where arctic-inference is installed
(scripts/install-suffix.sh): one request of a million tokens, for which the cache is told to keep no others; and a request
beside ten million tokens of earlier answers, 500 each, which both sides keep besides the request's own text. Each in a
process of its own, whose growth is the memory. These are rows of results/retrieval.csv.
"""

import argparse
import re
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import rows
from benchmarks.stats import first_difference, quiet_median
from tests.references.retrieval import scan
from vllm_double.retrieval import ContextRetriever, Found, HistoryRetriever, Queries, Source, Tokens
from vllm_double.retrieval.sources import warm_up
from vllm_double.retrieval.suffix_automaton.arena import Arena

CONTEXTS = (1024, 16 * 1024, 128 * 1024)
CALLS = 2000
SLICE = 512
MAX_TOKENS = 16
TAIL = 8
MANY = 32
PROMPT = 1_000_000
HISTORY = 10_000_000
ANSWER = 500
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
    """Microseconds of call(0), call(1), ...: quiet median, p99, max."""
    clock = time.perf_counter_ns
    spent = np.empty(calls)
    for i in range(calls):
        begin = clock()
        call(i)
        spent[i] = clock() - begin
    p50, p99 = quiet_median(spent.tolist(), min(40, calls)) / 1e3, np.quantile(spent, 0.99) / 1e3
    return f"{p50:6.2f} {p99:7.2f} {spent.max() / 1e3:8.1f}"


def check(text: Tokens) -> None:
    """Refuse to time what is wrong."""
    retriever = ContextRetriever()
    retriever.start(0, text)
    retriever.work(len(text))
    for tail in ([], text[100:108].tolist()):
        expected = scan(text.tolist(), len(text), tail, MAX_TOKENS, retriever.max_match)
        assert retriever.lookup(0, tail, MAX_TOKENS) == expected


class Asker:
    """Lookups of some requests at once, as the round makes them."""

    def __init__(self, source: Source, keys: Sequence[int], tails: Sequence[Sequence[int]]) -> None:
        self._source = source
        self._queries = Queries.of(keys, tails, [MAX_TOKENS] * len(keys))
        self.found = Found.empty(len(keys), MAX_TOKENS)

    def __call__(self, _: int = 0) -> None:
        self._source.lookup_many(self._queries, self.found)


def appender(source: Source, tokens: Tokens) -> Callable[[int], None]:
    """Append token i to the text of request 0."""
    key, starts = np.zeros(1, np.int32), np.array([0, 1], np.int32)
    return lambda i: source.extend_many(key, tokens[i : i + 1], starts)


def measure(name: str, text: Tokens, context: int) -> None:
    """Print one row: index ``context`` tokens, then look up and extend by what follows in the text."""
    retriever = ContextRetriever()
    retriever.start(0, text[:context])
    bulk = quantiles(lambda _: retriever.work(SLICE), context // SLICE)
    following = text[context:]
    tails = [following[i : i + TAIL].tolist() for i in range(CALLS)]
    bare = quantiles(Asker(retriever, [0], [()]))
    askers = [Asker(retriever, [0], [tail]) for tail in tails]
    tailed = quantiles(lambda i: askers[i]())
    single = quantiles(appender(retriever, following))
    for key in range(1, MANY):
        retriever.start(key, text[key * TAIL : context])
    retriever.work(MANY * context)
    shared = [Asker(retriever, range(MANY), tails[MANY * i : MANY * (i + 1)]) for i in range(CALLS // MANY)]
    many = quantiles(lambda i: shared[i](), len(shared))
    print(f"{name:9} {context:7} | {bulk} | {single} | {bare} | {tailed} | {many}")


class Context:
    """One request in our retriever."""

    def __init__(self) -> None:
        warm_up()
        self.source: Source = ContextRetriever(arena=Arena(4 << 30))
        self._asker = Asker(self.source, [0], [()])
        self._key, self._token, self._starts = np.zeros(1, np.int32), np.zeros(1, np.int32), np.array([0, 1], np.int32)

    def start(self, prompt: Tokens) -> None:
        self.source.start(0, prompt, None)
        self.source.work(len(prompt))

    def append(self, token: int) -> None:
        self._token[0] = token
        self.source.extend_many(self._key, self._token, self._starts)

    def look_up(self) -> Found:
        self._asker()
        return self._asker.found

    def continue_from(self, last: Tokens) -> list[int]:
        found = self.look_up()
        return found.tokens[0, : found.lengths[0]].tolist()


class Arctic:
    """One request in the suffix cache of arctic-inference."""

    num_cached = 0

    def __init__(self) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self._cache: Any = SuffixDecodingCache(max_tree_depth=SUFFIX_DEPTH, max_cached_requests=self.num_cached)

    def start(self, prompt: Tokens) -> None:
        self._cache.start_request(0, prompt)

    def append(self, token: int) -> None:
        self._cache.add_active_response(0, [token])

    def continue_from(self, last: Tokens) -> list[int]:
        return list(self._cache.speculate(0, last, max_spec_tokens=MAX_TOKENS).token_ids)


def answers(text: Tokens) -> Iterator[tuple[int, list[int]]]:
    """A key, not 0, and the tokens of each."""
    for key, end in enumerate(range(ANSWER, len(text) + 1, ANSWER), 1):
        yield key, text[end - ANSWER : end].tolist()


class History(Context):
    """A request of a tenant whose earlier ones were answered with the whole text."""

    def __init__(self) -> None:
        super().__init__()
        self.source = HistoryRetriever(HISTORY + HISTORY // ANSWER, arena=Arena(4 << 30))
        self._asker = Asker(self.source, [0], [()])

    def start(self, prompt: Tokens) -> None:
        for _, answer in answers(prompt):
            self.source.start(1, prompt[:0], "tenant")
            self.source.extend(1, answer)
            self.source.stop(1, keep=True)
            self.source.work(2 * ANSWER)
        self.source.start(0, prompt[-32:], "tenant")


def _worth(found: Found) -> float:
    """Tokens that are expected to be right, as the proposer chooses between sources."""
    return float(np.cumprod(found.beliefs[0, : found.lengths[0]]).sum())


class ContextAndHistory:
    """The same request with its own text."""

    def __init__(self) -> None:
        self._context, self._history = Context(), History()

    def start(self, prompt: Tokens) -> None:
        self._history.start(prompt)
        self._context.start(prompt[-32:])

    def append(self, token: int) -> None:
        self._context.append(token)
        self._history.append(token)

    def continue_from(self, last: Tokens) -> list[int]:
        best = max((source.look_up() for source in (self._context, self._history)), key=_worth)
        return best.tokens[0, : best.lengths[0]].tolist()


class ArcticAndAnswers(Arctic):
    """A request in the suffix cache that has seen all answers, which it looks up together."""

    num_cached = HISTORY // ANSWER + 1

    def start(self, prompt: Tokens) -> None:
        for key, answer in answers(prompt):
            self._cache.start_request(key, prompt[:0])
            self._cache.add_active_response(key, answer)
            self._cache.stop_request(key)
        self._cache.start_request(0, prompt[-32:])


Kind = type[Context | Arctic | History | ContextAndHistory]


def beside(kind: Kind, text: Tokens) -> dict[str, rows.Value]:
    """Figures of a prompt, and then of appending and continuing by turns."""
    num_tokens = len(text) - CALLS - MAX_TOKENS
    one, memory, clock = kind(), psutil.Process().memory_info, time.perf_counter_ns
    resident, begin = memory().rss, clock()
    one.start(text[:num_tokens])
    index_us, grown = (clock() - begin) / 1e3 / num_tokens, memory().rss - resident
    spent, num_right, num_offered = np.empty((2, CALLS)), 0, 0
    for i in range(CALLS):
        end = num_tokens + i + 1
        token, last = int(text[end - 1]), text[end - SUFFIX_DEPTH : end]
        begin = clock()
        one.append(token)
        middle = clock()
        found = one.continue_from(last)
        spent[:, i] = middle - begin, clock() - middle
        num_offered += len(found)
        difference = first_difference(found, text[end : end + len(found)].tolist())
        num_right += len(found) if difference is None else difference
    (append_p50, append_p99), (lookup_p50, lookup_p99) = (np.quantile(spent, [0.5, 0.99], axis=1).T / 1e3).tolist()
    return {
        "source": kind.__name__.lower(),
        "tokens": num_tokens,
        "index_us_per_token": index_us,
        "append_quiet_us": quiet_median(spent[0].tolist()) / 1e3,
        "append_p50_us": append_p50,
        "append_p99_us": append_p99,
        "lookup_quiet_us": quiet_median(spent[1].tolist()) / 1e3,
        "lookup_p50_us": lookup_p50,
        "lookup_p99_us": lookup_p99,
        "right_tokens": num_right / CALLS,
        "offered_tokens": num_offered / CALLS,
        "bytes_per_token": grown / num_tokens,
    }


def compare(output: Path) -> None:
    """Print and file a row for each source and text; the suffix cache where it is installed."""
    has_arctic = find_spec("arctic_inference") is not None
    kinds: list[Kind] = [Context, Arctic] if has_arctic else [Context]
    cases = [(name, kind, text) for name, text in texts(PROMPT + CALLS + MAX_TOKENS).items() for kind in kinds]
    kinds = [History, ContextAndHistory, ArcticAndAnswers] if has_arctic else [History, ContextAndHistory]
    cases += [("copies", kind, copies(HISTORY + CALLS + MAX_TOKENS)) for kind in kinds]
    print()
    for name, kind, text in cases:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            row = {"text": name} | pool.submit(beside, kind, text).result()
        print(
            "  ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{value}" for key, value in row.items()),
            flush=True,
        )
        rows.append(output, row | rows.provenance("benchmarks.retrieval_bench"))


def copies(num_tokens: int) -> Tokens:
    """Code, over and over, with a tenth of its tokens replaced each time. int32 [n]."""
    code, rng = standard_library_tokens(1_400_000), np.random.default_rng(0)
    parts = []
    for _ in range(-(-num_tokens // len(code))):
        part, replaced = code.copy(), rng.random(len(code)) < 0.1
        part[replaced] = rng.choice(code, int(replaced.sum()))
        parts.append(part)
    return np.concatenate(parts)[:num_tokens]


def main() -> None:
    """Print two tables and file the second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "retrieval.csv")
    options = parser.parse_args()
    begin = time.perf_counter()
    warm_up()
    print(f"warm_up {time.perf_counter() - begin:.2f} s; microseconds, calls through Python: quiet median, p99, max")
    print(
        f"{'text':9} {'context':>7} | {f'index {SLICE} tokens':>23} | {'extend by 1 token':>23}"
        f" | {'lookup, no tail':>23} | {f'lookup, tail {TAIL}':>23} | {f'{MANY} lookups, tails {TAIL}':>23}"
    )
    for name, text in texts(max(CONTEXTS) + CALLS + TAIL).items():
        check(text[:2000])
        for context in CONTEXTS:
            measure(name, text, context)
    compare(options.output)


if __name__ == "__main__":
    main()
