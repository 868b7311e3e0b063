"""Whether a datastore's sections are those of its documents: by definition, slowly."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from vllm_double.retrieval import Datastore
from vllm_double.retrieval.datastore.file import SEPARATOR
from vllm_double.retrieval.datastore.lookup_steps import NONE, SCAN

__all__ = ["check_datastore", "documents_of"]


class Node(NamedTuple):
    """See `lookup_steps.NODE`."""

    first: int
    stop: int
    depth: int
    parent: int
    token: int
    count: int
    successor: int


def _innermost(nodes: list[Node], first: int, stop: int, depth: int) -> int:
    """The deepest node around entries [first, stop) that is less deep than ``depth``, or NONE."""
    around = [i for i, node in enumerate(nodes) if node.first <= first and stop <= node.stop and node.depth < depth]
    return max(around, key=lambda i: nodes[i].depth, default=NONE)


def check_datastore(datastore: Datastore) -> None:
    """Raise AssertionError where the sections are not those of the documents. Slow, O(n^2): for tests."""
    lists = [[item for part in datastore.parts(section) for item in part.tolist()] for section in datastore.header.sections]
    tokens, starts, samples, order, followers, successors, shared, anchors = lists[:-1]
    nodes = [Node(*node) for node in lists[-1]]
    depth, num_entries = datastore.header.max_match, datastore.header.num_entries
    contexts: dict[int, list[int]] = {}
    position = 0
    for document in documents_of(datastore):
        position += 1
        for i in range(1, len(document)):
            contexts[position + i] = document[max(0, i - depth) : i][::-1]
        position += len(document)
    assert position + 1 == len(tokens) == datastore.header.num_tokens
    assert sorted(order) == sorted(contexts), "each token with another before it is an entry"
    ordered = [contexts[position] for position in order]
    assert ordered == sorted(ordered), "entries are sorted by context, read backwards"
    last = [context[0] for context in ordered]
    assert starts == np.searchsorted(last, np.arange(datastore.header.vocab_size + 1)).tolist()
    assert followers == [tokens[position] for position in order]
    num_bits = datastore.header.vocab_size.bit_length()
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
    assert {(node.first, node.stop): node.depth for node in nodes} == groups, "each large group is one node"
    assert len(groups) == len(nodes)
    for node in nodes:
        inside = followers[node.first : node.stop]
        assert node.count == inside.count(node.token)
        assert all((inside.count(token), -token) <= (node.count, -node.token) for token in set(inside))
        behind = [successors[i] for i in range(node.first, node.stop) if followers[i] == node.token]
        assert node.successor in behind and (node.successor != NONE or set(behind) == {NONE})
        assert node.parent == _innermost(nodes, node.first, node.stop, node.depth)
    for i, anchor in enumerate(anchors):
        assert anchor == _innermost(nodes, i * SCAN, i * SCAN + 1, depth + 1)


def documents_of(datastore: Datastore) -> Iterator[list[int]]:
    """The corpus, document by document."""
    tokens = np.concatenate(list(datastore.parts(datastore.header.sections[0])))
    ends = np.flatnonzero(tokens == SEPARATOR)
    for start, end in pairwise(ends):
        yield tokens[start + 1 : end].tolist()
