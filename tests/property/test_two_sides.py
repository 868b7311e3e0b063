"""Both sides at once: the real proposer and the real draft worker, under any interleaving of what can happen to them.

The target is an adversary that accepts what it likes; the logs lose, repeat, delay and reorder the worker's records. What is
proposed and what each side believes is compared with an account in whole texts, where the real things have hashes, tries,
trees and pages. `make fuzz` takes 20,000 examples, a test run FUZZ_EXAMPLES or 300.
"""

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.draft_view import check_integrity, free_pages, trees
from tests.witness import Wire, WitnessChannel, WitnessEngine, WitnessRetriever
from vllm_double.draft import frontier as frontier_module
from vllm_double.draft import lookups
from vllm_double.draft.frontier import FrontierLimits
from vllm_double.draft.page_pool import partition_key
from vllm_double.draft.worker import DraftWorker
from vllm_double.retrieval import ContextRetriever, HistoryRetriever, context
from vllm_double.retrieval.sources import warm_up
from vllm_double.target import draft_link, request_table, speculation_trie
from vllm_double.target.calibration import DRAFT_NAME
from vllm_double.target.proposer import Proposer, RequestParams, Row
from vllm_double.transport import messages
from vllm_double.transport.base import stamp
from vllm_double.transport.messages import Forget, Release

K = 5
VOCAB = 12  # of the draft; the target has one token more
NAMES = ("p", "q", "r")
# What the target says where nothing else is drawn, over and over: tenants have no word in common.
PHRASES = {"a": [0, 1, 2, 3, 4, 5], "b": [6, 7, 8, 9, 10, 11], None: [0, 6, 3, 9, 1, 11]}

# Bounds that no example of a few dozen steps would reach otherwise.
SMALL = {
    draft_link: {
        "_ADMIT_TOKENS_PER_COMMAND": 8, "_ADMIT_TOKENS_PER_ROUND": 40, "_DRAIN_BYTES_PER_ROUND": 1700, "_COMMIT_WORDS": 64,
    },
    request_table: {"_NUM_SLOTS": 1, "_NUM_NODES": 64, "_NUM_EDGES": 32},
    speculation_trie: {"_TRIAL_TOKENS": 4, "_FIRST_PAUSE": 2, "_LONGEST_PAUSE": 3, "_PLACE_TOKENS": 3},
    messages: {"MAX_TOKENS": 16},  # a command behind a rest is the longest
    frontier_module: {"_MIN_BELIEF": 0.05},
    lookups: {"_INDEX_TOKENS_PER_ITERATION": 16},
    context: {"_AT_ONCE": 4, "_SLICE": 4},
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What the target does with a row: which draft tokens it verifies, how many it accepts, and what it says then.

    token: None or too large: the next of the tenant's phrase; VOCAB: one that the draft does not know.
    """

    verified: str
    accepted: int
    token: int | None


PLANS = st.builds(
    Plan,
    st.sampled_from(["chain"] * 6 + ["cut", "padded", "fillers", "none", "reading", "absent"]),
    st.integers(0, K),
    st.none() | st.integers(0, 3 * VOCAB),
)
PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8) | st.builds(
    lambda tenant, start, length: [PHRASES[tenant][(start + place) % 6] for place in range(length)],
    st.sampled_from(list(PHRASES)), st.integers(0, 5), st.integers(1, 20),
)  # fmt: skip
COMMON = {
    "max_length": st.sampled_from([60, 60, 60, 18]),
    "stop_token_ids": st.sampled_from([frozenset(), frozenset(), frozenset({5}), frozenset({3, 9})]),
    "tenant": st.sampled_from(["a", "b", "a", "b", None]),
    "use_drafts": st.sampled_from([True] * 9 + [False]),
    "use_worker": st.sampled_from([True] * 9 + [False]),
}
GREEDY = st.builds(RequestParams, temperature=st.just(0.0), **COMMON)
SAMPLED = st.builds(
    RequestParams,
    temperature=st.sampled_from([0.3, 0.8, 1.0]),
    seed=st.sampled_from([0, 7, -1, -(1 << 63), (1 << 63) - 1]),
    top_k=st.sampled_from([0, 0, 1, 3]),
    top_p=st.sampled_from([1.0, 1.0, 0.5]),
    min_p=st.sampled_from([0.0, 0.0, 0.125]),
    **COMMON,
)
PARAMS = GREEDY | SAMPLED


@dataclass
class Live:
    """A running request. length: of its text when it was last in a round; longest: it ever was. chain: what was proposed then.

    handle: under which the worker's records are for it. drafted: what was delivered of these, as texts.
    """

    params: RequestParams
    text: list[int]
    length: int
    longest: int = 0
    finished: bool = False
    chain: list[int] = field(default_factory=list)
    handle: int | None = None
    drafted: set[bytes] = field(default_factory=set)


class TwoSides(RuleBasedStateMachine):
    """See the module."""

    @initialize(
        num_pages=st.sampled_from([200, 200, 14]), page_size=st.integers(2, 3), history=st.sampled_from([400, 64]),
        retrieval=st.booleans(), prompt=PROMPTS, params=PARAMS,
    )  # fmt: skip
    def begin(
        self, num_pages: int, page_size: int, history: int, retrieval: bool, prompt: list[int], params: RequestParams
    ) -> None:
        self.patches = [mock.patch.multiple(module, **small) for module, small in SMALL.items()]
        for patch in self.patches:
            patch.start()
        self.clock = itertools.count().__next__
        self.num_pages, self.page_size, self.history = num_pages, page_size, history
        self.live: dict[str, Live] = {}
        self.num_late = 0
        self.contexts: dict[tuple[int, int], bytes] = {}  # of each record, by handle and hash
        self.end = WitnessChannel(Wire(1 << 16), Wire(1 << 13))
        self.end.reports.on_push = self.published
        self.end.reports.on_drain = self.delivered
        self.sources = self.make_sources() if retrieval else {}
        self.proposer = Proposer(K, self.end, list(self.sources.values()), self.clock)
        self.attach()
        self.admit("p", prompt, params)

    def teardown(self) -> None:
        if hasattr(self, "patches"):
            try:
                self.everyone_leaves()
            finally:
                for patch in self.patches:
                    patch.stop()

    def make_sources(self) -> dict[str, WitnessRetriever]:
        return {source.name: WitnessRetriever(source) for source in (ContextRetriever(), HistoryRetriever(self.history))}

    def attach(self) -> None:
        self.worker_end = self.end.attach()
        self.engine = WitnessEngine(VOCAB, self.num_pages, self.page_size, max_length=56)
        limits = FrontierLimits(
            K, nodes_per_iteration=4, children_per_node=4, prefill_tokens=12, min_path_prob=1e-2, max_nodes=600
        )
        self.worker_sources = self.make_sources()
        self.worker = DraftWorker(self.engine, self.worker_end, limits, self.clock, list(self.worker_sources.values()))
        self.starved = False

    # ---- requests ---------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), prompt=PROMPTS, params=PARAMS)
    def admit(self, name: str, prompt: list[int], params: RequestParams) -> None:
        if len(prompt) < params.max_length:
            tokens = np.array(prompt, np.int32)
            self.proposer.admit(name, tokens, params)
            tokens.fill(-1)
            self.live[name] = Live(params, list(prompt), len(prompt), len(prompt))

    @rule(name=st.sampled_from(NAMES))
    def finish(self, name: str) -> None:
        self.proposer.finish(name)
        self.live.pop(name, None)

    @rule(name=st.sampled_from(NAMES), keep=st.integers(1, 30), new=st.lists(st.integers(0, VOCAB - 1), max_size=8))
    def rewind(self, name: str, keep: int, new: list[int]) -> None:
        """The next round finds another text. One of the same length could only be told by comparing all of it."""
        live = self.live.get(name)
        if live is not None and len(live.text[:keep]) + len(new) != live.length:
            live.text[keep:] = new

    # ---- rounds -----------------------------------------------------------------------------------------------

    @rule(plans=st.lists(PLANS, min_size=1, max_size=6), turns=st.sampled_from([3, 6, 1, 0]))
    def rounds(self, plans: list[Plan], turns: int) -> None:
        """As many as there are plans, each of which a row or another has in turn. The worker has so many turns before each."""
        for number in range(len(plans)):
            self.work(turns)
            self.round({name: plans[(number + place) % len(plans)] for place, name in enumerate(self.live)})

    def round(self, plans: Mapping[str, Plan]) -> None:
        rows = [self.row(name, self.live[name], plan) for name, plan in plans.items() if plan.verified != "absent"]
        rows.append(Row("a stranger", np.array([1, 2], np.int32), 1, [3]))
        self.end.refused = False
        self.proposer.index(16)
        chains = self.proposer.propose(rows)
        assert chains.pop() == []
        for row, chain in zip(rows, chains, strict=False):
            live = self.live[row.request_id]
            if row.num_sampled == 0:
                assert chain == []
            else:
                self.follow(live, row)
                self.check_chain(row.request_id, live, chain)
                self.check_sent(row.request_id, live, chain)
            row.tokens.fill(-1)  # the batch's buffer holds something else by the next step
        assert self.proposer.counters.late_nodes == self.num_late
        self.both_sides_agree_on_who_is_there()

    def row(self, name: str, live: Live, plan: Plan) -> Row:
        """What the target makes of the chain. The scheduler may have cut it, or filled up or scheduled what nobody proposed."""
        if plan.verified == "reading":
            return Row(name, np.array(live.text, np.int32), 0, ())
        num_proposed = {"chain": len(live.chain), "cut": len(live.chain) // 2, "padded": 1}.get(plan.verified, 0)
        proposed = live.chain[:num_proposed]
        verified = proposed + [-1] * (K - len(proposed) if plan.verified in ("padded", "fillers") else 0)
        token = plan.token
        if token is None or token > VOCAB:
            phrase = PHRASES[live.params.tenant]
            token = phrase[(phrase.index(live.text[-1]) + 1) % 6 if live.text[-1] in phrase else 0]
        live.text += proposed[: plan.accepted]
        live.text.append(token)
        num_sampled = min(plan.accepted, len(proposed)) + 1
        return Row(name, np.array(live.text, np.int32), num_sampled, verified)

    def follow(self, live: Live, row: Row) -> None:
        """Another text than at the last round begins anew; behind its end nothing counts."""
        if len(live.text) - row.num_sampled != live.length:
            live.finished, live.drafted = False, set()
        live.length = len(live.text)
        live.longest = max(live.longest, live.length)
        new = live.text[len(live.text) - row.num_sampled :]
        live.finished |= not live.params.stop_token_ids.isdisjoint(new) or live.length >= live.params.max_length

    def check_chain(self, name: str, live: Live, chain: list[int]) -> None:
        """Each token was drafted or retrieved for exactly the text before it."""
        params, slot, tries = live.params, self.proposer._slots[name], self.proposer.table.tries
        live.chain = chain
        steps = tries.chains[slot, : tries.requests["chain_length"][slot]]
        assert steps["token"].tolist() == chain
        if not params.use_drafts or live.finished:
            assert chain == []
        assert len(chain) <= K and (not chain or live.length + len(chain) < params.max_length)
        assert params.stop_token_ids.isdisjoint(chain[:-1])
        accept_prob, path = 1.0, bytes(live.text)
        for token, index, _, next_accept_prob in steps.tolist():
            path += bytes([token])
            source = self.proposer.calibration.sources[index]
            said = live.drafted if source == DRAFT_NAME else self.sources[source].found[slot]
            assert path in said, f"{source} did not say {path[-1]} behind {path[:-1]!r}"
            assert 0.0 < next_accept_prob <= accept_prob
            accept_prob = next_accept_prob

    def request(self, name: str) -> np.void:
        """Its record."""
        record: np.void = self.proposer.table.tries.requests[self.proposer._slots[name]]
        return record

    def check_sent(self, name: str, live: Live, chain: list[int]) -> None:
        """The worker was sent what was committed and what is being verified, if there was room for it."""
        request = self.request(name)
        if not live.params.use_drafts or not live.params.use_worker:
            assert request["session"] == 0
        elif not live.finished:
            handle = int(request["handle"])
            if request["pause"] > 0:
                sent = self.end.texts.get(handle, b"") if request["session"] == self.end.session else b""
                assert bytes(live.text).startswith(sent), "it was sent something else before it paused"
            elif request["session"] != 0:
                assert request["session"] == self.end.session
                assert self.end.texts[handle] == bytes(live.text) and self.end.chains[handle] == chain
            else:
                is_too_long = not request["use_worker"] and live.longest >= self.worker.frontier.max_length
                assert self.end.session == 0 or self.end.refused or is_too_long or self.proposer.link._admit_budget < 0

    # ---- the worker -------------------------------------------------------------------------------------------

    @rule(turns=st.integers(1, 4))
    def work(self, turns: int) -> None:
        for _ in range(turns):
            if self.worker_end.superseded:
                self.attach()
            self.turn()

    def turn(self) -> None:
        self.end.room = None
        self.worker.turn()
        frontier = self.worker.frontier
        self.engine.poison(free_pages(frontier._pool))
        self.starved |= frontier.counters["requests_evicted"] > 0
        check_integrity(frontier)
        texts = self.end.texts
        for handle, request in frontier._requests.items():
            assert self.worker_end.superseded or bytes(trees(frontier)[handle].tokens) == texts[handle]
            partition = partition_key(request.tenant, self.end.epochs[handle])
            assert request.prefix._keys[0] == partition, "it finds what was read before a reset"
            live = next((live for live in self.live.values() if live.handle == handle), None)
            if live is not None:
                params = live.params
                expected = (params.seed, params.temperature, params.top_k, params.top_p, params.min_p)
                seed, temperature, _, *filters = frontier._sampling[request.slot].tolist()
                assert (seed, temperature, *filters) == pytest.approx(expected), "it does not know what the target draws from"
        for handle, text in texts.items():
            # A request is given up where pages ran out, or where the draft does not know a token.
            assert handle in frontier._requests or self.starved or VOCAB in text
        if Forget() not in self.proposer.link._unsent and not self.worker_end.superseded:
            for kept in itertools.chain(*self.worker_sources["history"].kept.values()):
                assert kept.start >= self.end.outdated.get(kept.key, 0), "said with weights that the target has no more"

    def published(self, nodes: npt.NDArray[np.void]) -> None:
        """Each record stands behind the text as the worker was told it, no deeper than is of use to any verification."""
        for node, behind in zip(nodes, self.engine.contexts, strict=True):
            handle = int(node["handle"])
            text = self.end.texts[handle]
            assert node["position"] == len(behind) and behind.startswith(text)
            assert len(behind) <= len(text) + len(self.end.chains[handle]) + K
            assert self.contexts.setdefault((handle, int(node["prefix_hash"])), behind) == behind

    def delivered(self, session: int, nodes: npt.NDArray[np.void]) -> None:
        """What the proposer may propose from now on."""
        if session != stamp(self.end.session):
            return
        for node in nodes:
            handle = int(node["handle"])
            behind = self.contexts[handle, int(node["prefix_hash"])]
            live = next((live for live in self.live.values() if live.handle == handle), None)
            if live is None or len(behind) < live.length:
                self.num_late += 1
            else:
                live.drafted.update(behind + bytes([token]) for token in node["tokens"][: node["count"]].tolist())

    # ---- misfortunes ------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.end.reports) > 0)
    @rule(fate=st.sampled_from(["lost", "late", "repeated", "overtaken"]), which=st.integers(0, 7))
    def record(self, fate: str, which: int) -> None:
        wire = self.end.reports
        frame = wire.take(which % len(wire))
        if fate == "late":
            wire.late.append(frame)
        elif fate == "repeated":
            wire.put(0, frame)
            wire.put(len(wire), frame)
        elif fate == "overtaken":
            wire.put(len(wire), frame)

    @precondition(lambda self: self.end.reports.late)
    @rule(again=st.booleans())
    def late_record(self, again: bool) -> None:
        wire = self.end.reports
        wire.put(0, wire.late[0] if again else wire.late.pop(0))

    @rule(room=st.integers(0, 4))
    def full_log(self, room: int) -> None:
        """There is room for so many commands until the worker reads on."""
        self.end.room = room

    @rule(is_late=st.booleans())
    def restart(self, is_late: bool) -> None:
        """is_late: a command is written just after the new worker has attached, by a target that has not seen it yet."""
        wire = self.end.commands
        late = [wire.take(-1)] if is_late and len(wire) else []
        self.attach()
        for frame in late:
            wire.put(0, frame)

    @rule()
    def worker_leaves(self) -> None:
        self.worker_end.close()

    @precondition(lambda self: len(self.end.commands) > 0)
    @rule()
    def damaged_command(self) -> None:
        wire = self.end.commands
        frame = bytearray(wire.take(-1))
        frame[-1] ^= 1
        wire.put(len(wire), bytes(frame))

    @rule()
    def reset(self) -> None:
        """Drafting was switched off, and on again."""
        self.proposer.reset()
        running = {name: live for name, live in self.live.items() if not live.finished}
        self.live = {}
        self.both_sides_agree_on_who_is_there()
        for name, live in running.items():
            self.admit(name, live.text, live.params)

    @rule()
    def new_weights(self) -> None:
        self.proposer.forget_history()
        self.end.outdate()
        self.end.num_resets += 1

    @rule()
    def reset_cache(self) -> None:
        self.proposer.reset_prefix_cache()
        self.end.num_resets += 1

    @rule()
    def everyone_leaves(self) -> None:
        """Nothing is left on either side."""
        for name in NAMES:
            self.finish(name)
        self.turn()  # there is room now
        if self.worker_end.superseded:
            self.attach()
        self.proposer.propose([])
        self.turn()
        assert not self.proposer.link._unsent and not self.proposer.link._handles and not self.end.texts
        assert len(self.worker.frontier) == 0
        assert self.worker.frontier._pool.num_free == self.num_pages - 1
        for source in (*self.sources.values(), *self.worker_sources.values()):
            assert not source.texts

    # ---- at all times -----------------------------------------------------------------------------------------

    @invariant()
    def both_sides_agree_on_who_is_there(self) -> None:
        proposer = self.proposer
        proposer.check_integrity()
        assert proposer._slots.keys() == self.live.keys()
        for name, live in self.live.items():
            request = self.request(name)
            handle = int(request["handle"]) if request["session"] != 0 else None
            if handle is not None and handle != live.handle:
                live.drafted = set()
            live.handle = handle
            for source in self.sources.values() if live.params.use_drafts else ():
                assert source.tenants[proposer._slots[name]] == live.params.tenant
        released = {command.handle for command in proposer.link._unsent if isinstance(command, Release)}
        assert released <= self.end.admitted, "a request is to be released that never was admitted"
        for handle in self.end.texts:
            assert handle in proposer.link._handles or handle in released, "the worker keeps a request that is gone"
        for name in self.live:
            request = self.request(name)
            is_known = request["session"] != 0 and request["session"] == self.end.session
            assert not is_known or int(request["handle"]) in self.end.texts


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    warm_up()


TestTwoSides = TwoSides.TestCase
TestTwoSides.settings = settings(
    deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "300")),
    stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
)
