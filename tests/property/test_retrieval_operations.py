"""A hundred thousand operations on context, history and datastore, every lookup beside a scan."""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np

from tests.property.test_history import Twin
from tests.property.test_retrieval_properties import fibonacci_word
from tests.references.automaton import check_history
from tests.references.retrieval import recall, scan, scan_documents
from vllm_double.retrieval import ContextRetriever, Datastore, DatastoreRetriever, HistoryRetriever, history
from vllm_double.retrieval.datastore.build import build

OPERATIONS = 100_000
MAX_MATCH = 6
MAX_TOKENS = 5
LONGEST = 60
ROOM = 120
TENANTS = ("a", "b", None)


def streams(rng: random.Random) -> list[Callable[[], Iterator[int]]]:
    """Kinds of text."""
    word = fibonacci_word(400)
    return [
        lambda: iter(lambda: rng.randrange(3), None),
        lambda: iter(lambda: rng.randrange(20), None),
        lambda: itertools.cycle(rng.choices(range(6), k=rng.randint(1, 9))),
        lambda: itertools.repeat(rng.randrange(3)),
        lambda: iter(word[rng.randrange(100) :]),
    ]


def test_a_lookup_equals_a_scan_after_extends_evictions_and_tenant_switches(tmp_path: Path) -> None:
    rng = random.Random(0)
    kinds = streams(rng)
    context = ContextRetriever(MAX_MATCH)
    past = HistoryRetriever(ROOM, MAX_MATCH, share_unnamed=True)
    documents = [list(itertools.islice(kind(), 25)) for kind in kinds]
    build(tmp_path / "store", [np.array(document, np.int32) for document in documents], 20, bytes(32), MAX_MATCH)
    corpus = DatastoreRetriever(Datastore(tmp_path / "store"))
    twin = Twin(ROOM, 16)
    live: dict[int, tuple[str | None, Iterator[int], list[int], list[int]]] = {}  # tenant, stream, prompt, output
    next_key, evicted, found, known = 0, 0, 0, 0
    with mock.patch.object(history, "_SMALLEST", 16):
        for _ in range(OPERATIONS):
            action = rng.random()
            if not live or (len(live) < 5 and action < 0.05):
                tenant, stream = rng.choice(TENANTS), rng.choice(kinds)()
                prompt = list(itertools.islice(stream, rng.randint(0, 10)))
                for retriever in (context, past, corpus):
                    retriever.start(next_key, np.array(prompt, np.int32), tenant)
                context.work(LONGEST)
                live[next_key] = (tenant, stream, prompt, [])
                next_key += 1
                continue
            key = rng.choice(list(live))
            tenant, stream, prompt, output = live[key]
            if action < 0.6:
                new = list(itertools.islice(stream, rng.randint(1, 4)))
                for retriever in (context, past, corpus):
                    retriever.extend(key, new)
                output += new
                if len(output) > LONGEST or not new:
                    keep = rng.random() < 0.8
                    for retriever in (context, past, corpus):
                        retriever.stop(key, keep)
                    if keep and len(output) >= 2:
                        twin.add(tenant, output)
                    before = [id(held) for _, _, held in twin.generations]
                    budget = rng.choice((LONGEST // 3, ROOM))  # the first leaves a part of the text for later
                    past.work(budget)
                    twin.work(budget)
                    evicted += not set(before) <= {id(held) for _, _, held in twin.generations}
                    check_history(past)
                    del live[key]
                continue
            text, tail = prompt + output, list(itertools.islice(rng.choice(kinds)(), rng.randint(0, 3)))
            assert context.lookup(key, tail, MAX_TOKENS) == scan(text, len(text), tail, MAX_TOKENS, MAX_MATCH)
            expected = recall(twin.of(tenant), text[-MAX_MATCH:] + tail, MAX_TOKENS, MAX_MATCH)
            assert past.lookup(key, tail, MAX_TOKENS) == expected
            found += expected is not None
            expected = scan_documents(documents, text[-MAX_MATCH:] + tail, MAX_TOKENS, MAX_MATCH)
            assert corpus.lookup(key, tail, MAX_TOKENS) == expected
            known += expected is not None
    assert evicted > 100 and found > 10_000 and known > 10_000, "the test tests nothing"
