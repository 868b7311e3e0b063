"""The frontier against a fake engine whose pages notice every wrong share, under random targets and commands."""

import math
import random
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft_view import check_integrity, trees
from tests.fakes.engine import FakeEngine, hashed_logits, rows_of
from vllm_double.draft import frontier as frontier_module
from vllm_double.draft.engine.base import Batch
from vllm_double.draft.frontier import Frontier, FrontierLimits
from vllm_double.prefix_hash import mix, seed
from vllm_double.retrieval import ContextRetriever, Continuation, HistoryRetriever
from vllm_double.retrieval.base import Source, Tokens
from vllm_double.transport.messages import Admit, Commit, Forget, Release

VOCAB = 12
NO_TOKENS = np.empty(0, np.int32)
NO_PROBS = np.empty(0, np.float32)


def make(
    num_pages: int = 200, page_size: int = 4, children_per_node: int = 8, retrieval: bool = False,
    logits: Callable[[Sequence[int]], npt.NDArray[np.float32]] | None = None, **limits: float,
) -> tuple[FakeEngine, Frontier]:  # fmt: skip
    logits = logits or hashed_logits(VOCAB)
    engine = FakeEngine(logits, vocab_size=VOCAB, num_pages=num_pages, page_size=page_size, max_length=120)
    chosen = FrontierLimits(
        **{"num_speculative_tokens": 6, "children_per_node": children_per_node, "max_nodes": 2000, **limits}
    )
    sources = [ContextRetriever(), HistoryRetriever(400, share_unnamed=True)] if retrieval else []
    return engine, Frontier(engine, chosen, sources)


def admit(frontier: Frontier, handle: int, text: list[int], max_length: int = 100) -> None:
    frontier.apply(Admit(handle, len(text), np.array(text, np.int32), 0.0, max_length, (), ""))


def turn(engine: FakeEngine, frontier: Frontier) -> np.ndarray:
    batch = frontier.select()
    return answer(engine, frontier, batch) if len(batch) else np.zeros(0)


def answer(engine: FakeEngine, frontier: Frontier, batch: Batch) -> np.ndarray:
    engine.copy_slots(frontier.tail_copies)
    records = frontier.expand(*engine.forward(batch, frontier._limits.children_per_node))
    check_integrity(frontier)
    return records


def commit(frontier: Frontier, handle: int, keep: int, tokens: list[int], chain: list[int] | None = None) -> None:
    chain = chain or []
    probs = np.full(len(chain), 0.5, np.float32)
    frontier.apply(Commit(handle, keep, np.array(tokens, np.int32), np.array(chain, np.int32), probs))
    check_integrity(frontier)


def test_single_path_drafts_the_greedy_continuation_to_the_allowed_depth() -> None:
    engine, frontier = make(children_per_node=1, min_path_prob=1e-9)
    text = [1, 2, 3]
    admit(frontier, 7, text)
    found: dict[int, tuple[int, int]] = {}
    while len(records := turn(engine, frontier)):
        for record in records:
            found[int(record["prefix_hash"])] = (int(record["position"]), int(record["tokens"][0]))
    logits = hashed_logits(VOCAB)
    prefix = seed(7)
    for depth in range(7):
        token = int(np.argmax(logits(text)))
        assert found[prefix] == (3 + depth, token)
        prefix, text = mix(prefix, token), [*text, token]
    assert len(found) == 7


def test_every_branch_counts_the_pages_of_a_long_text() -> None:
    engine, frontier = make()
    text = [index % VOCAB for index in range(90)]
    admit(frontier, 1, text)
    (request,) = trees(frontier).values()
    for token in (None, 3, 5):  # another branch becomes the trunk, as a rule
        if token is not None:
            assert request.root is not None
            commit(frontier, 1, len(text), [token])
            text.append(token)
        for _ in range(4):
            turn(engine, frontier)
        assert len(request.held_pages()) > 3
        assert {frontier._pool.pages["holders"][page] for page in request.table()[: 90 // 4]} == {1}
    frontier.apply(Release(1, keep=False))
    assert frontier._pool.num_free == 199


def test_the_most_probable_path_is_worked_on_first() -> None:
    engine, frontier = make(nodes_per_iteration=1)
    admit(frontier, 1, [5])
    turn(engine, frontier)
    reaches: list[float] = []
    for _ in range(20):
        batch = frontier.select()
        request = next(iter(trees(frontier).values()))
        assert request.root is not None
        (node,) = (node for node in _nodes(request.root) if node.branch >= 0 and not node.alternatives)
        assert [row.tokens for row in rows_of(batch)] == [[node.token]]
        reaches.append(math.exp(node.log_prob - request.root.log_prob))
        left = [
            parent.log_prob + log_prob - request.root.log_prob
            for parent in _nodes(request.root)
            for token, log_prob in zip(parent.alternatives, parent.alternative_log_probs, strict=True)
            if token not in parent.children
        ]
        assert left
        assert all(math.exp(log_prob) <= reaches[-1] + 1e-9 for log_prob in left)
        answer(engine, frontier, batch)


def _nodes(node):  # type: ignore[no-untyped-def]
    yield node
    for child in node.children.values():
        yield from _nodes(child)


def test_a_given_chain_is_read_in_one_forward() -> None:
    engine, frontier = make(nodes_per_iteration=16)
    admit(frontier, 1, [1, 2, 3])
    turn(engine, frontier)
    chain = [9, 9, 8, 9]
    # certain tokens come before all siblings
    frontier.apply(Commit(1, 3, NO_TOKENS, np.array(chain, np.int32), np.ones(4, np.float32)))
    batch = frontier.select()
    assert rows_of(batch)[0].tokens == chain
    answer(engine, frontier, batch)


PERIOD = [3, 4, 5, 6, 7]


def _period(context: Sequence[int]) -> npt.NDArray[np.float32]:
    return 9 * np.eye(VOCAB, dtype=np.float32)[PERIOD[(PERIOD.index(context[-1]) + 1) % 5] if context[-1] in PERIOD else 0]


def test_what_is_retrieved_is_read_in_one_forward_and_the_draft_confirms_it() -> None:
    engine, frontier = make(retrieval=True, logits=_period, nodes_per_iteration=16)
    admit(frontier, 1, PERIOD * 3)
    batch = frontier.select()
    assert [row.tokens for row in rows_of(batch)] == [PERIOD * 3], "nothing is indexed yet"
    answer(engine, frontier, batch)
    commit(frontier, 1, 15, [3])
    batch = frontier.select()
    assert rows_of(batch)[0].tokens == [3, 4, 5, 6, 7, 3, 4]
    records = answer(engine, frontier, batch)
    assert records["tokens"][:7, 0].tolist() == [4, 5, 6, 7, 3, 4, 5]
    assert frontier.counters["retrieved_tokens"] == frontier.counters["confirmed_tokens"] == 6


def test_where_the_draft_contradicts_what_was_retrieved_its_word_counts() -> None:
    engine, frontier = make(
        retrieval=True, logits=lambda context: 9 * np.eye(VOCAB, dtype=np.float32)[1], nodes_per_iteration=16
    )
    admit(frontier, 1, PERIOD * 3)
    turn(engine, frontier)
    commit(frontier, 1, 15, [3])
    turn(engine, frontier)
    request = trees(frontier)[1]
    assert request.root is not None
    wrong = request.root.children[4]
    assert wrong.is_retrieved and wrong.log_prob - request.root.log_prob < math.log(0.01)
    assert frontier.counters["retrieved_tokens"] == 6 and frontier.counters["confirmed_tokens"] == 0
    batch = frontier.select()
    assert rows_of(batch)[0].tokens == [1], "work went on behind what the draft does not believe"


def test_a_retrieved_token_that_the_draft_does_not_know_is_not_read() -> None:
    class Corpus(Source):
        name = "corpus"

        def start(self, key: int, tokens: Tokens, tenant: str | None) -> None: ...

        def extend(self, key: int, tokens: Sequence[int]) -> None: ...

        def stop(self, key: int, keep: bool) -> None: ...

        def lookup(self, key: int, tail: Sequence[int], max_tokens: int) -> Continuation | None:
            return Continuation.of([4, VOCAB, 5], 9, [9, 9, 9], [9, 9, 9])

    engine, frontier = make(logits=_period)
    frontier._lookups.sources.append(Corpus())
    admit(frontier, 1, PERIOD)
    batch = frontier.select()
    assert set(rows_of(batch)[0].tokens[len(PERIOD) :]) == {4}
    answer(engine, frontier, batch)


def test_what_survives_a_commit_is_not_drafted_again() -> None:
    engine, frontier = make(nodes_per_iteration=4)
    admit(frontier, 1, [1, 2, 3])
    for _ in range(12):
        turn(engine, frontier)
    request = next(iter(trees(frontier).values()))
    assert request.root is not None
    child = max(request.root.children.values(), key=lambda n: n.log_prob)
    below = {node.prefix_hash: node.alternatives for node in _nodes(child)}
    assert child.branch >= 0 and len(below) > 4
    commit(frontier, 1, 3, [child.token])
    assert {node.prefix_hash: node.alternatives for node in _nodes(request.root)} == below
    assert request.num_cached == 4


def test_every_request_is_served_between_two_commits_though_one_is_sure_of_itself() -> None:
    engine, frontier = make(nodes_per_iteration=2)
    for handle in range(6):
        admit(frontier, handle + 1, [handle])
    turn(engine, frontier)
    for handle in range(6):
        commit(frontier, handle + 1, 1, [3])
    turn(engine, frontier)
    assert all(request.num_expanded > 0 for request in trees(frontier).values())


def test_pages_that_run_out_silence_the_last_request_and_lose_nothing() -> None:
    engine, frontier = make(num_pages=12, page_size=4)
    for handle in range(5):
        admit(frontier, handle + 1, [handle] * 15)
    for _ in range(40):
        turn(engine, frontier)
    assert 1 <= len(frontier) < 5
    for handle in range(5):
        frontier.apply(Release(handle + 1))
    check_integrity(frontier)
    assert frontier._pool.num_free == 11


def test_a_late_command_is_counted_and_ignored() -> None:
    _, frontier = make()
    commit(frontier, 99, 0, [1])
    frontier.apply(Release(99))
    assert frontier.counters["late_commands"] == 2


@pytest.mark.parametrize("keep", [2, 4])
def test_a_commit_that_does_not_fit_the_text_ends_the_drafting_for_it(keep: int) -> None:
    _, frontier = make()
    admit(frontier, 1, [1, 2, 3])
    commit(frontier, 1, keep, [1])
    assert len(frontier) == 0 and frontier.counters["late_commands"] == 1


@settings(deadline=None, max_examples=60)
@given(
    rng=st.randoms(use_true_random=False),
    page_size=st.sampled_from([1, 2, 4, 7]),
    nodes=st.integers(1, 12),
    children=st.integers(1, VOCAB),
    num_pages=st.sampled_from([14, 40, 400]),
    max_nodes=st.sampled_from([40, 120, 2000]),
    retrieval=st.booleans(),
)
def test_any_interleaving_keeps_pages_and_trees_sound(
    rng: random.Random, page_size: int, nodes: int, children: int, num_pages: int, max_nodes: int, retrieval: bool
) -> None:
    # Random texts repeat little: what is retrieved of them is taken, sure or not.
    with mock.patch.object(frontier_module, "_MIN_BELIEF", 0.05):
        made = make(num_pages, page_size, children, retrieval, nodes_per_iteration=nodes, prefill_tokens=5, max_nodes=max_nodes)
        interleave(rng, made)


def interleave(rng: random.Random, made: tuple[FakeEngine, Frontier]) -> None:
    engine, frontier = made
    texts: dict[int, list[int]] = {}
    bases: dict[int, int] = {}
    next_handle = 1
    for _ in range(60):
        action = rng.choice(["admit", "commit", "commit", "turn", "turn", "turn", "release", "rewind", "chunked"])
        live = [h for h in texts if h in frontier._requests]
        if action == "admit" or (action == "chunked" and len(live) < 3):
            text = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
            split = rng.randint(1, len(text)) if action == "chunked" else len(text)
            frontier.apply(Admit(next_handle, len(text), np.array(text[:split], np.int32), 0.0, 100, (), ""))
            if rng.random() < 0.5:
                turn(engine, frontier)
            if split < len(text) and next_handle in frontier._requests:
                commit(frontier, next_handle, split, text[split:])
            texts[next_handle], bases[next_handle] = text, len(text)
            next_handle += 1
        elif action == "turn":
            turn(engine, frontier)
        elif not live:
            continue
        elif action == "commit":
            handle = rng.choice(live)
            text = texts[handle]
            if len(text) > 80:
                continue
            node, tokens = trees(frontier)[handle].root, []
            for _ in range(rng.randint(0, 5)):
                options = [*node.children, *node.alternatives] if node is not None else []
                token = rng.choice(options) if options and rng.random() < 0.8 else rng.randrange(VOCAB)
                node = node.children.get(token) if node is not None else None
                tokens.append(token)
            chain = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 4))]
            commit(frontier, handle, len(text), tokens, chain)
            text.extend(tokens)
        elif action == "rewind":
            handle = rng.choice(live)
            keep = rng.randint(bases[handle], len(texts[handle]))
            del texts[handle][keep:]
            commit(frontier, handle, keep, [])
        else:
            handle = rng.choice(live)
            frontier.apply(rng.choice([Release(handle), Release(handle, keep=False)]))
            del texts[handle]
            if rng.random() < 0.1:
                frontier.apply(Forget())
        check_integrity(frontier)
        for handle, request in trees(frontier).items():
            assert request.tokens == texts[handle]


def test_a_full_node_pool_gives_up_its_least_probable_paths_and_counts_them() -> None:
    engine, frontier = make(max_nodes=60, nodes_per_iteration=4, min_path_prob=1e-9)
    admit(frontier, 1, [1, 2, 3])
    for _ in range(40):
        turn(engine, frontier)
    assert frontier._pool.totals["num_free_nodes"][0] == 0 and frontier.counters["nodes_evicted"] == 0
    root = trees(frontier)[1].root
    assert root is not None
    before = {node.prefix_hash: node.log_prob for node in _nodes(root)}
    admit(frontier, 2, [4, 5])
    left = list(_nodes(root))
    gone = before.keys() - {node.prefix_hash for node in left}
    assert len(gone) == frontier.counters["nodes_evicted"] > 0
    leaves = [node.log_prob for node in left if not node.children and node.index != root.index]
    assert max(before[name] for name in gone) <= min(leaves, default=0.0)
    for _ in range(4):
        turn(engine, frontier)
    second = trees(frontier)[2].root
    assert second is not None and second.children
