"""What the compiled frontier takes into each forward, against an obvious twin that looks at all there is each time."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft_view import Node, check_integrity, outputs, trees
from tests.fakes.engine import FakeEngine, hashed_logits, rows_of
from vllm_double.draft.arena import NONE, Forward
from vllm_double.draft.frontier import MIN_ASKED_PROB, Frontier, FrontierLimits
from vllm_double.draft.lookups import Lookups
from vllm_double.prefix_hash import mix
from vllm_double.retrieval.base import Continuation, Found, Source
from vllm_double.transport.messages import Admit, Commit, Release

VOCAB, K, MAX_LENGTH, STOP = 12, 5, 60, 11
Path = tuple[int, ...]


class Oracle(Source):
    """Now and then knows what comes behind a text: a function of the text, and right or wrong."""

    name = "oracle"

    def __init__(self) -> None:
        self.texts: dict[int, list[int]] = {}

    def start(self, key, tokens, tenant=None):  # type: ignore[no-untyped-def]
        self.texts[key] = tokens.tolist()

    def extend(self, key, tokens):  # type: ignore[no-untyped-def]
        self.texts[key] += tokens

    def stop(self, key, keep=False):  # type: ignore[no-untyped-def]
        del self.texts[key]

    def lookup(self, key, tail, max_tokens):  # type: ignore[no-untyped-def]
        return self.knows([*self.texts[key], *tail], max_tokens)

    @staticmethod
    def knows(text: Sequence[int], max_tokens: int) -> Continuation | None:
        number = 1
        for token in text:
            number = mix(number, token)
        rng = random.Random(number)
        if rng.random() < 0.5:
            return None
        length = min(rng.randint(1, 4), max_tokens)
        beliefs = [rng.choice([0.3, 0.6, 0.7, 0.9, 0.99]) for _ in range(length)]
        return Continuation([rng.randrange(VOCAB) for _ in range(length)], 3, [1] * length, [1] * length, beliefs)


@dataclass
class TwinNode:
    log_prob: float
    is_computed: bool = False
    is_retrieved: bool = False
    listed: list[tuple[int, float]] = field(default_factory=list)
    ahead: list[tuple[int, float]] = field(default_factory=list)


class TwinTree:
    """Nodes by their path behind the text; the root is the empty path."""

    def __init__(self, text: list[int]) -> None:
        self.text = text
        self.base = len(text)  # a prompt may end with a stop token
        self.chain_length = self.num_expanded = 0
        self.nodes: dict[Path, TwinNode] = {(): TwinNode(0.0)}

    def commit(self, tokens: Sequence[int]) -> None:
        moved, depth = tuple(tokens), len(tokens)
        self.text += tokens
        self.nodes = {path[depth:]: node for path, node in self.nodes.items() if path[:depth] == moved}
        self.nodes.setdefault((), TwinNode(0.0))
        self.chain_length = self.num_expanded = 0

    def children(self, path: Path) -> set[int]:
        return {other[-1] for other in self.nodes if other and other[:-1] == path}

    def child(self, path: Path, token: int, log_prob: float) -> Path:
        self.nodes.setdefault((*path, token), TwinNode(self.nodes[path].log_prob + log_prob))
        return (*path, token)

    def room(self, path: Path) -> int:
        """Positions behind the path that may be drafted."""
        return self.chain_length + K - len(path)

    def candidates(self, waiting: set[Path], min_log_prob: float) -> list[tuple[float, Path]]:
        found = [(node.log_prob, path) for path, node in self.nodes.items() if path and not node.is_computed]
        for path, node in self.nodes.items():
            known = self.children(path)
            found += [(node.log_prob + log_prob, (*path, token)) for token, log_prob in node.listed if token not in known]
        return [
            (log_prob - self.nodes[()].log_prob, path)
            for log_prob, path in found
            if path[-1] != STOP and path not in waiting and self.room(path) >= 0
            and len(self.text) + len(path) < MAX_LENGTH and log_prob - self.nodes[()].log_prob >= min_log_prob
        ]  # fmt: skip


class Twin:
    """What a frontier does, but for pages and the order of prompts."""

    def __init__(self, limits: FrontierLimits, has_sources: bool) -> None:
        self.limits = limits
        self.has_sources = has_sources
        self.trees: dict[int, TwinTree] = {}

    def select(self, preferred: set[tuple[int, Path]], preferred_first: set[tuple[int, Path]]) -> list[tuple[int, Path]]:
        """(request, path) of all nodes that the forward computes behind the texts; of equally probable ones those preferred.

        The sources are asked once, about all that would be computed if nothing were retrieved.
        """
        tips: set[tuple[int, Path]] = set()
        for handle, tree in self.trees.items():
            has_ended = len(tree.text) > tree.base and tree.text[-1] == STOP
            if not tree.nodes[()].is_computed and not has_ended and len(tree.text) < MAX_LENGTH:
                tree.nodes[()].is_computed = True
                tree.num_expanded += 1
                tips.add((handle, ()))
                self.look_ahead(handle, ())
        chosen = self.pick(preferred_first, set(tips))
        if self.has_sources and self.ask([*tips, *chosen]):
            for handle, path in chosen:
                self.trees[handle].nodes[path].is_computed = False
            for handle, path in tips:
                self.look_ahead(handle, path)
            chosen = self.pick(preferred, set(tips))
        for handle, tree in self.trees.items():
            tree.num_expanded += sum(name == handle for name, _ in chosen)
        return chosen

    def pick(self, preferred: set[tuple[int, Path]], tips: set[tuple[int, Path]]) -> list[tuple[int, Path]]:
        fresh, chosen = set(tips), []
        waiting: dict[int, set[Path]] = {handle: set() for handle in self.trees}
        while True:
            options = [
                (self.is_unserved(handle, chosen), log_prob, (handle, path) in preferred, -order, -len(path), path, handle)
                for order, (handle, tree) in enumerate(self.trees.items())
                if tree.nodes[()].is_computed
                for log_prob, path in tree.candidates(waiting[handle], math.log(self.limits.min_path_prob))
            ]
            if not options or (len(chosen) >= self.limits.nodes_per_iteration and not max(options)[0]):
                return chosen
            *_, path, handle = max(options)
            tree, parent = self.trees[handle], path[:-1]
            if path not in tree.nodes:
                tree.child(parent, path[-1], dict(tree.nodes[parent].listed)[path[-1]])
            if (handle, parent) in tips:
                tips.remove((handle, parent))
            elif not tree.nodes[parent].is_computed or (handle, parent) in fresh:
                waiting[handle].add(path)
                continue
            tree.nodes[path].is_computed = True
            tips.add((handle, path))
            fresh.add((handle, path))
            chosen.append((handle, path))
            self.look_ahead(handle, path)

    def is_unserved(self, handle: int, chosen: list[tuple[int, Path]]) -> bool:
        return self.trees[handle].num_expanded == 0 and all(name != handle for name, _ in chosen)

    def ask(self, about: list[tuple[int, Path]]) -> bool:
        """Whether anything was found behind one of these nodes."""
        has_found = False
        for handle, path in about:
            tree = self.trees[handle]
            node = tree.nodes[path]
            is_likely = node.log_prob - tree.nodes[()].log_prob >= math.log(MIN_ASKED_PROB)
            if tree.children(path) or not is_likely or node.ahead or tree.room(path) <= 0:
                continue
            found = Oracle.knows([*tree.text, *path], tree.room(path))
            for token, belief in zip(found.tokens, found.beliefs, strict=True) if found is not None else ():
                if belief < 0.5:
                    break
                node.ahead.append((token, float(np.float32(math.log(np.float32(belief))))))
                has_found = True
        return has_found

    def look_ahead(self, handle: int, path: Path) -> None:
        tree = self.trees[handle]
        node = tree.nodes[path]
        if node.ahead and not tree.children(path):
            (token, log_prob), *rest = node.ahead
            child = tree.nodes[tree.child(path, token, log_prob)]
            child.is_retrieved, child.ahead, node.ahead = True, rest, []

    def expand(self, handle: int, path: Path, tokens: list[int], probs: np.ndarray) -> None:
        tree = self.trees[handle]
        log_probs = [math.log(max(prob, 1e-9)) for prob in probs.tolist()]
        node = tree.nodes[path]
        node.listed = list(zip(tokens, log_probs, strict=True))
        for token in tree.children(path):
            child = tree.nodes[(*path, token)]
            if child.is_retrieved:
                rest = math.log(max(1.0 - sum(probs.tolist()), 1e-9))
                difference = node.log_prob + dict(node.listed).get(token, min(log_probs[-1], rest)) - child.log_prob
                child.log_prob += difference
                if not child.is_computed:
                    for other, below in tree.nodes.items():
                        if len(other) > len(path) + 1 and other[: len(path) + 1] == (*path, token):
                            below.log_prob += difference


def look(node: Node, path: Path = ()) -> dict[Path, tuple[float, bool, bool]]:
    """The tree below a node, with what the twin knows of it, too."""
    found = {path: (node.log_prob, node.branch >= 0, node.is_retrieved)}
    for token, child in node.children.items():
        found |= look(child, (*path, token))
    return found


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1 << 30),
    nodes=st.integers(1, 10),
    children=st.integers(1, VOCAB),
    min_path_prob=st.sampled_from([1e-9, 0.02]),
    has_sources=st.booleans(),
)
def test_each_forward_takes_what_the_obvious_twin_takes(
    seed: int, nodes: int, children: int, min_path_prob: float, has_sources: bool
) -> None:
    rng = random.Random(seed)
    limits = FrontierLimits(K, nodes, children, prefill_tokens=1000, min_path_prob=min_path_prob, max_nodes=4000)
    engine = FakeEngine(hashed_logits(VOCAB), vocab_size=VOCAB, num_pages=3000, page_size=rng.choice([1, 3, 8]), max_length=80)
    frontier, twin = Frontier(engine, limits, [Oracle()] if has_sources else []), Twin(limits, has_sources)
    for number in range(1, 40):
        action = rng.choice(["turn", "turn", "commit", "commit", "admit", "release"])
        handle = rng.choice([*twin.trees, 0])
        if action == "admit" and len(twin.trees) < 3:
            text = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
            frontier.apply(Admit(number, len(text), np.array(text, np.int32), 0.0, MAX_LENGTH, (STOP,), ""))
            twin.trees[number] = TwinTree(text)
        elif action == "release" and handle and rng.random() < 0.3:
            frontier.apply(Release(handle))
            del twin.trees[handle]
        elif action == "commit" and handle:
            tree = twin.trees[handle]
            # The target follows the tree, or not; and says a stop token at the end at most.
            tokens: list[int] = []
            for _ in range(min(rng.randint(0, 4), MAX_LENGTH - len(tree.text))):
                known = sorted(tree.children(tuple(tokens)))
                tokens.append(rng.choice(known) if known and rng.random() < 0.8 else rng.randrange(STOP))
            chain = [rng.randrange(STOP) for _ in range(rng.randint(0, K))]
            probs = np.array([rng.uniform(0.2, 0.9) for _ in chain], np.float32)
            frontier.apply(Commit(handle, len(tree.text), np.array(tokens, np.int32), np.array(chain, np.int32), probs))
            tree.commit(tokens)
            tree.chain_length, path = len(chain), ()
            for token, log_prob in zip(chain, map(math.log, probs.tolist()), strict=True):
                path = tree.child(path, token, log_prob)
        elif action == "turn":
            turn(engine, frontier, twin)
        for name, tree in twin.trees.items():
            root = trees(frontier)[name].root
            assert root is not None
            expected = {p: (n.log_prob - tree.nodes[()].log_prob, n.is_computed, n.is_retrieved) for p, n in tree.nodes.items()}
            found = {path: (log_prob - root.log_prob, *rest) for path, (log_prob, *rest) in look(root).items()}
            assert found.keys() == expected.keys()
            for path, (log_prob, *rest) in found.items():
                assert rest == list(expected[path][1:]) and math.isclose(log_prob, expected[path][0], abs_tol=1e-5)


def turn(engine: FakeEngine, frontier: Frontier, twin: Twin) -> None:
    picked_first: set[tuple[int, Path]] = set()

    def ask(forward: Forward, num_queries: int) -> list[Found]:
        for index in forward.picks[: forward.progress["num_picks"][0]].tolist():
            node, path = Node(frontier, index), ()
            while node.parent != NONE:
                node, path = Node(frontier, node.parent), (node.token, *path)
            picked_first.add((node.handle, path))
        return Lookups.ask(frontier._lookups, forward, num_queries)

    frontier._lookups.ask = ask  # type: ignore[method-assign]
    batch = frontier.select()
    engine.copy_slots(frontier.tail_copies)
    # Where each output stands: behind the text as the pages and the row's tokens have it.
    behind = [
        (*engine.context(row.pages, row.start), *row.tokens[: len(row.tokens) - row.num_outputs + output + 1])
        for row in rows_of(batch)
        for output in range(row.num_outputs)
    ]
    handles = [node.handle for node in outputs(frontier)]
    found = [(handle, text[len(twin.trees[handle].text) :]) for handle, text in zip(handles, behind, strict=True)]
    assert all(list(text[: len(twin.trees[h].text)]) == twin.trees[h].text for h, text in zip(handles, behind, strict=True))
    assert sorted(entry for entry in found if entry[1]) == sorted(twin.select(set(found), picked_first or set(found)))
    if not len(batch):
        return
    tokens, probs = engine.forward(batch, frontier._limits.children_per_node)
    for (handle, path), line, chances in zip(found, tokens.tolist(), probs, strict=True):
        twin.expand(handle, path, line, chances)
    frontier.expand(tokens, probs)
    check_integrity(frontier)
