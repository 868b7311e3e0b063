"""The draft's prefix cache: what was read once is not read again, and no text, tenant or epoch reads another's."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft_view import cached_pages, check_integrity, check_pool, free_pages, run_handles, trees
from tests.fakes.engine import FakeEngine, hashed_logits, rows_of
from vllm_double.draft.frontier import Frontier, FrontierLimits
from vllm_double.draft.page_pool import PagePool, num_available, page_key, partition_key, release_page, share_page, take_page
from vllm_double.transport.messages import Admit, Commit, Release

VOCAB = 12
NO_TOKENS = np.empty(0, np.int32)
NO_PROBS = np.empty(0, np.float32)


class World:
    """A frontier on the fake engine. ``read``: tokens that each request's catching up took since its admission."""

    def __init__(self, num_pages: int = 400, page_size: int = 4, prefix_caching: bool = True, **limits: int) -> None:
        self.engine = FakeEngine(hashed_logits(VOCAB), vocab_size=VOCAB, num_pages=num_pages, page_size=page_size)
        chosen = FrontierLimits(
            **{"num_speculative_tokens": 4, "nodes_per_iteration": 4, "children_per_node": 4, "max_nodes": 500, **limits}
        )
        self.frontier = Frontier(self.engine, chosen, prefix_caching=prefix_caching)
        self.read: dict[int, int] = {}

    def admit(self, handle: int, text: Sequence[int], tenant: str = "", base: int = 0, epoch: int = 0) -> None:
        self.read[handle] = 0
        tokens = np.array(text, np.int32)
        self.frontier.apply(Admit(handle, base or len(text), tokens, 0.0, 250, (), tenant, epoch))
        check_integrity(self.frontier)

    def commit(self, handle: int, keep: int, tokens: Sequence[int]) -> None:
        self.frontier.apply(Commit(handle, keep, np.array(tokens, np.int32), NO_TOKENS, NO_PROBS))
        check_integrity(self.frontier)

    def release(self, handle: int) -> None:
        self.frontier.apply(Release(handle))
        check_integrity(self.frontier)

    def turn(self) -> set[int]:
        """One forward; returns the handles of the requests in it."""
        batch = self.frontier.select()
        self.engine.poison(free_pages(self.frontier._pool))
        if len(batch):
            self.engine.copy_slots(self.frontier.tail_copies)
            self.frontier.expand(*self.engine.forward(batch, self.frontier._limits.children_per_node))
        handles = run_handles(self.frontier)
        for handle, row in zip(handles, rows_of(batch), strict=True):
            self.read[handle] += max(0, min(trees(self.frontier)[handle].length - row.start, len(row.tokens)))
        check_integrity(self.frontier)
        return set(handles)

    def read_all(self) -> None:
        while any(request.num_cached < request.length for request in trees(self.frontier).values()):
            self.turn()

    def answer(self, handle: int, tokens: Sequence[int]) -> None:
        """The target's answer, a few tokens a step, as the draft foresaw them or not."""
        for start in range(0, len(tokens), 3):
            self.commit(handle, trees(self.frontier)[handle].length, tokens[start : start + 3])
            self.read_all()
            self.turn()


def text_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_the_turns_of_a_conversation_are_read_once(prefix_caching: bool) -> None:
    world = World(prefix_caching=prefix_caching)
    conversation: list[int] = []
    read = []
    for number in range(1, 5):
        conversation += text_of(number, 21)  # what the user says
        world.admit(number, conversation)
        world.read_all()
        read.append(world.read[number])
        answer = text_of(-number % 97, 20)
        world.answer(number, answer)
        conversation += answer
        world.release(number)
    if prefix_caching:
        # 41 tokens a turn, of which those of the last page that was not full are read again: 21 + at most 3.
        assert read == [21, 41 + 21 - 40, 82 + 21 - 80, 123 + 21 - 120]
        assert world.frontier.counters["prefix_cache_hits"] == 40 + 80 + 120
    else:
        assert read == [21, 62, 103, 144]
        assert world.frontier.counters["prefix_cache_hits"] == 0
    assert world.frontier.counters["prefix_cache_queries"] == 21 + 62 + 103 + 144


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 40])
def test_of_a_prompt_that_is_known_whole_something_is_left_to_read(length: int) -> None:
    world = World()
    text = text_of(0, length)
    for handle in (1, 2):
        world.admit(handle, text)
        world.read_all()
    assert world.read == {1: length, 2: length - (length - 1) // 4 * 4}
    assert trees(world.frontier)[2].root is not None and trees(world.frontier)[2].root.alternatives


def test_a_live_request_shares_its_pages_and_each_writes_its_own_tail() -> None:
    world = World()
    text = text_of(0, 33)
    world.admit(1, text)
    world.read_all()
    world.admit(2, [*text, 5])
    world.read_all()
    assert world.read[2] == 2
    tables = [trees(world.frontier)[handle].table() for handle in (1, 2)]
    assert tables[0][:8] == tables[1][:8] and tables[0][8] != tables[1][8]
    world.answer(1, text_of(1, 20))
    world.answer(2, text_of(2, 20))


def test_of_prompts_that_come_together_one_is_read() -> None:
    world = World(prefill_tokens=8)
    text = text_of(0, 40)
    for handle in range(1, 5):
        world.admit(handle, text)
    world.read_all()
    assert world.read == {1: 40, 2: 4, 3: 4, 4: 4}


def test_what_is_behind_a_known_prefix_is_read_in_chunks() -> None:
    world = World(prefill_tokens=8)
    world.admit(1, [*text_of(0, 16), 1])
    world.read_all()
    forwards = world.engine.num_forwards
    world.admit(2, text_of(0, 16) + text_of(1, 30))
    world.turn()
    assert trees(world.frontier)[2].num_cached == 16 + 8
    world.read_all()
    assert world.read[2] == 30 and world.engine.num_forwards - forwards == 4


def test_tenants_share_nothing_and_the_unnamed_share_with_each_other_only() -> None:
    world = World()
    text = text_of(0, 41)
    for handle, tenant in enumerate(["a", "b", "", "a", "b", ""], 1):
        world.admit(handle, text, tenant)
        world.read_all()
        world.release(handle)
    assert world.read == {1: 41, 2: 41, 3: 41, 4: 1, 5: 1, 6: 1}


def test_an_epoch_finds_nothing_of_another() -> None:
    world = World()
    for handle, epoch in enumerate([0, 1, 1, 2, 0], 1):
        world.admit(handle, text_of(0, 41), epoch=epoch)
        world.read_all()
        world.release(handle)
    assert world.read == {1: 41, 2: 41, 3: 1, 4: 41, 5: 1}


def test_who_still_runs_keeps_his_pages_and_shares_them_with_no_later_epoch() -> None:
    world = World()
    text = text_of(0, 16)
    world.admit(1, text)
    world.answer(1, text_of(1, 9))
    world.admit(2, text + text_of(1, 9), epoch=1)
    world.read_all()
    assert world.read[2] == 25
    world.answer(1, text_of(2, 12))  # pages that fill after the reset belong to the old epoch, too
    world.admit(3, text + text_of(1, 9) + text_of(2, 12), epoch=1)
    world.read_all()
    assert world.read[3] == 37 - 24


def test_pages_of_an_older_epoch_make_room_for_those_of_the_new() -> None:
    world = World(num_pages=21, nodes_per_iteration=1, children_per_node=1)
    for handle, epoch in enumerate([0, 1, 1, 2, 2], 1):
        world.admit(handle, text_of(0, 60), epoch=epoch)
        world.read_all()
        world.release(handle)
    assert world.read == {1: 60, 2: 60, 3: 4, 4: 60, 5: 4}


def test_a_text_that_is_taken_back_does_not_write_what_others_read() -> None:
    world = World()
    text = text_of(0, 16)
    world.admit(1, text)
    world.answer(1, text_of(1, 12))
    world.admit(2, text + text_of(1, 12) + [3])  # shares the page that the first will take half of back
    world.read_all()
    assert world.read[2] == 1
    world.commit(1, 22, [7])
    world.read_all()
    world.answer(1, text_of(2, 12))
    world.answer(2, text_of(3, 12))
    world.admit(3, text + text_of(1, 12) + [4])
    world.read_all()
    assert world.read[3] == 1


def test_pages_are_taken_from_the_oldest_text_and_from_its_end() -> None:
    world = World(num_pages=41, nodes_per_iteration=1, children_per_node=1)
    for handle in (1, 2):
        world.admit(handle, text_of(handle, 60))
        world.read_all()
        world.release(handle)
    # 15 of 40 pages are each text's: the third gets what is free and the end of the first.
    world.admit(3, text_of(3, 59))
    world.read_all()
    world.release(3)
    # To read that again takes the page that the third did not fill, and four from the end of the second.
    for handle, known in ((5, 40), (6, 44)):
        world.admit(handle, text_of(handle - 4, 60))
        world.read_all()
        assert world.read[handle] == 60 - known
        world.release(handle)


def test_where_pages_are_shared_enough_requests_are_given_up_at_once() -> None:
    world = World(num_pages=17)
    text = text_of(0, 36)
    world.admit(1, text + text_of(1, 4))
    world.read_all()
    for handle in (2, 3, 4):  # without the others each of them gives back nothing, or little
        world.admit(handle, text + text_of(handle, 16))
    while not world.frontier._pool.totals["is_short"][0]:
        world.turn()
    world.frontier._evict_requests()
    check_integrity(world.frontier)
    left = world.frontier._requests.values()
    assert 1 <= len(left) < 4
    assert sum(map(world.frontier._num_lacking, left)) <= world.frontier._pool.num_free


class ObviousPool:
    """The page pool in lists: a key is the whole text that a page ends, what was released last is found by its time."""

    def __init__(self, num_pages: int) -> None:
        self.holders = dict.fromkeys(range(1, num_pages), 0)
        self.cached: list[tuple[tuple[object, ...], int]] = []
        self.released_at = dict.fromkeys(self.holders, 0)
        self.now = 0

    def evicted_next(self) -> tuple[object, ...] | None:
        """The text that goes if a page is taken now."""
        idle = [page for page, count in self.holders.items() if count == 0]
        texts = {page: text for text, page in self.cached}
        if not idle or any(page not in texts for page in idle):
            return None
        return texts[min(idle, key=self.released_at.__getitem__)]

    def take(self, page: int) -> None:
        gone = self.evicted_next()
        assert self.holders[page] == 0
        self.cached = [entry for entry in self.cached if entry[0] != gone]
        assert all(cached != page for _, cached in self.cached), "a page of the cache was given away"
        self.holders[page] = 1

    def release(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            self.now += 1
            self.holders[page] -= 1
            self.released_at[page] = self.now


@settings(deadline=None, max_examples=150)
@given(rng=st.randoms(use_true_random=False), num_pages=st.sampled_from([3, 8, 20]))
def test_the_pool_keeps_and_evicts_what_its_obvious_twin_does(rng: random.Random, num_pages: int) -> None:
    """Holders take tables, share what they find, fill pages in order, and let go; there are two tenants, epochs and tokens."""
    pool, twin = PagePool(num_pages), ObviousPool(num_pages)
    held: list[tuple[tuple[str, int], list[int], list[int]]] = []  # partition, a token for each page, pages

    def key_of(partition: tuple[str, int], text: Sequence[int]) -> bytes:
        key = partition_key(*partition)
        for token in text:
            key = page_key(key, [token] * 4)
        return key

    for _ in range(80):
        action = rng.choice(["admit", "admit", "grow", "grow", "release"])
        if action == "admit":
            partition, text = (rng.choice("ab"), rng.randrange(2)), [rng.randrange(2) for _ in range(rng.randint(1, 4))]
            pages: list[int] = []
            for end in range(1, len(text) + 1):
                page = pool.lookup(key_of(partition, text[:end]))
                assert page == next((p for known, p in twin.cached if known == (partition, *text[:end])), None)
                if page is None:
                    break
                pages.append(page)
            for page in pages:
                share_page(pool.pages, pool.totals, page)
                twin.holders[page] += 1
            held.append((partition, text[: len(pages)], pages))
        elif action == "grow" and held:
            partition, text, pages = rng.choice(held)
            if num_available(pool.totals) == 0:
                assert all(twin.holders.values())
                continue
            page = take_page(pool.pages, pool.totals)
            twin.take(page)
            text.append(rng.randrange(2))
            pages.append(page)
            if rng.random() < 0.8:
                pool.insert(key_of(partition, text), page)
                if all(known != (partition, *text) for known, _ in twin.cached):
                    twin.cached.append(((partition, *text), page))
        elif action == "release" and held:
            _, _, pages = held.pop(rng.randrange(len(held)))
            for page in reversed(pages):
                release_page(pool.pages, pool.totals, page)
            twin.release(pages)
        check_pool(pool, [pages for _, _, pages in held])
        assert pool.num_free == sum(count == 0 for count in twin.holders.values())
        assert {key_of(text[0], text[1:]): page for text, page in twin.cached} == cached_pages(pool)  # type: ignore[arg-type]


class KnownTexts:
    """What a prefix cache of unlimited room must find: every full page that was read, by partition and whole text up to it."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.known: set[tuple[tuple[str, int], tuple[int, ...]]] = set()

    def hit(self, partition: tuple[str, int], text: Sequence[int], start: int) -> int:
        """Tokens from ``start`` on that need not be read of a prompt; its last one is."""
        end = start - start % self.page_size
        while end + self.page_size < len(text) and (partition, tuple(text[: end + self.page_size])) in self.known:
            end += self.page_size
        return max(end - start, 0)

    def learn(self, partition: tuple[str, int], text: Sequence[int]) -> None:
        for end in range(self.page_size, len(text) + 1, self.page_size):
            self.known.add((partition, tuple(text[:end])))


@settings(deadline=None, max_examples=80)
@given(
    rng=st.randoms(use_true_random=False),
    page_size=st.sampled_from([1, 2, 4, 7]),
    prefill_tokens=st.sampled_from([3, 8, 200]),
    num_pages=st.sampled_from([12, 30, 3000]),
)
def test_any_interleaving_reads_a_prefix_once(rng: random.Random, page_size: int, prefill_tokens: int, num_pages: int) -> None:
    """With room for all, exactly what the obvious twin knows is not read again; with few pages, never more than that.

    The fake engine fails where a page holds another text than the request's.
    """
    world = World(num_pages, page_size, prefill_tokens=prefill_tokens)
    twin = KnownTexts(page_size)
    texts: dict[int, list[int]] = {}
    bases: dict[int, int] = {}
    partitions: dict[int, tuple[str, int]] = {}
    past: list[list[int]] = [[]]
    hits = 0
    last = epoch = 0

    def enter(text: list[int], tenant: str, first: int) -> None:
        nonlocal last
        last += 1
        world.admit(last, text[:first], tenant, base=len(text), epoch=epoch)
        texts[last], bases[last], partitions[last] = list(text[:first]), len(text), (tenant, epoch)
        if first < len(text):
            if rng.random() < 0.5:
                step()
            if last in world.frontier._requests:
                world.commit(last, first, text[first:])
                texts[last] = list(text)

    def step() -> None:
        nonlocal hits
        before = {h: r.num_cached for h, r in trees(world.frontier).items() if r.num_cached < r.length}
        was_starved = world.frontier._pool.totals["is_short"][0]
        seen = world.turn()
        if not was_starved:
            hits += sum(twin.hit(partitions[h], texts[h][: bases[h]], start) for h, start in before.items())
        for handle in seen:
            twin.learn(partitions[handle], texts[handle][: trees(world.frontier)[handle].num_cached])

    def leave(handle: int) -> None:
        past.append(texts.pop(handle))
        world.release(handle)

    for _ in range(50):
        live = [handle for handle in texts if handle in world.frontier._requests]
        action = rng.choice(["admit", "turn", "turn", "turn", "commit", "commit", "release", "again", "rewind", "reset"])
        if action == "admit" and len(live) < 6:
            start = rng.choice(past)
            text = start[: rng.randint(0, len(start))] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
            enter(text[:90], rng.choice(["", "", "a"]), rng.randint(1, min(len(text), 90)))
        elif action == "turn":
            step()
        elif action == "reset":
            epoch += rng.random() < 0.3
        elif not live:
            continue
        elif action == "commit":
            handle = rng.choice(live)
            root = trees(world.frontier)[handle].root
            tokens = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 5))]
            if root is not None and root.alternatives and rng.random() < 0.7:
                tokens[0] = root.alternatives[0]
            if len(texts[handle]) < 90:
                world.commit(handle, len(texts[handle]), tokens)
                texts[handle] += tokens
        elif action == "release":
            leave(rng.choice(live))
        elif action == "again":  # how the target takes back a text that shrank
            handle = rng.choice(live)
            text, (tenant, _) = texts[handle], partitions[handle]
            leave(handle)
            enter(text[: rng.randint(1, len(text))], tenant, 1)
        else:
            handle = rng.choice(live)
            keep = rng.randint(min(bases[handle], len(texts[handle])), len(texts[handle]))
            world.commit(handle, keep, [])
            del texts[handle][keep:]
        found = world.frontier.counters["prefix_cache_hits"]
        assert found == hits if num_pages == 3000 else found <= world.frontier.counters["prefix_cache_queries"]
    for handle in [handle for handle in texts if handle in world.frontier._requests]:
        world.release(handle)
    assert world.frontier._pool.num_free == num_pages - 1
