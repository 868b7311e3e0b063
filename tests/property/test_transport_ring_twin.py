"""The ring against a deque that does the same by counting."""

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vllm_double.transport.ring import HEADER_BYTES, INDEX_BYTES, RingConsumer, RingProducer

WORDS = st.integers(0, 2**32 - 1)


class RingAgainstDeque(RuleBasedStateMachine):
    @initialize(capacity=st.integers(HEADER_BYTES, 400))
    def start(self, capacity):
        self.capacity = capacity
        self.buffer = memoryview(bytearray(INDEX_BYTES + capacity))
        self.producer = RingProducer(self.buffer)
        self.consumer = RingConsumer(self.buffer)
        self.twin = deque()

    def used(self):
        return sum(HEADER_BYTES + len(payload) for _, _, payload in self.twin)

    @rule(kind=WORDS, session=WORDS, data=st.data())
    def push(self, kind, session, data):
        payload = data.draw(st.binary(max_size=self.capacity - HEADER_BYTES))
        fits = self.used() + HEADER_BYTES + len(payload) <= self.capacity
        assert self.producer.push(kind, session, payload) == fits
        if fits:
            self.twin.append((kind, session, payload))

    @rule(max_bytes=st.one_of(st.integers(0, 500), st.just(1 << 20)))
    def drain(self, max_bytes):
        expected = []
        taken = 0
        while self.twin:
            taken += HEADER_BYTES + len(self.twin[0][2])
            if expected and taken > max_bytes:
                break
            expected.append(self.twin.popleft())
        got = self.consumer.drain(max_bytes)
        assert [(kind, session, bytes(payload)) for kind, session, payload in got] == expected

    @rule()
    def skip(self):
        self.consumer.skip()
        self.twin.clear()

    @rule()
    def restart_the_producer(self):
        self.producer = RingProducer(self.buffer)

    @rule()
    def restart_the_consumer(self):
        self.consumer = RingConsumer(self.buffer)

    @invariant()
    def nothing_is_corrupt_and_pending_is_true(self):
        if hasattr(self, "consumer"):
            assert self.consumer.corrupt == 0
            assert self.consumer.pending == bool(self.twin)


TestRingAgainstDeque = RingAgainstDeque.TestCase
TestRingAgainstDeque.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@settings(max_examples=300, deadline=None)
@given(
    capacity=st.integers(HEADER_BYTES + 20, 400),
    before=st.lists(st.binary(max_size=20), max_size=30),
    wounds=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=6),
    after=st.lists(st.binary(max_size=20), max_size=10),
)
def test_wounds_anywhere_never_let_a_wrong_record_pass_and_always_heal(capacity, before, wounds, after):
    buffer = memoryview(bytearray(INDEX_BYTES + capacity))
    producer, consumer = RingProducer(buffer), RingConsumer(buffer)
    sent = []

    def turn(payload):
        sent.append(payload)
        fits = producer.push(len(sent) - 1, 5, payload)
        for kind, session, got in consumer.drain(1 << 20):
            assert session == 5
            assert got == sent[kind]
        return fits

    for payload in before:
        turn(payload)
    sent.append(b"standing")
    producer.push(len(sent) - 1, 5, b"standing")
    for at, flip in wounds:
        buffer[at % len(buffer)] ^= flip
    for payload in [*after, b"", b"", b""]:
        turn(payload)
    corrupt = consumer.corrupt
    assert turn(b"healed")
    assert not consumer.pending
    assert consumer.corrupt == corrupt
