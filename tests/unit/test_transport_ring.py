import random
import struct

import pytest

from tests.faults import open_frame
from vllm_double.transport.ring import HEADER_BYTES, INDEX_BYTES, RingConsumer, RingProducer, seal_frame

EVERYTHING = 1 << 30


def ring(capacity=4096):
    buffer = memoryview(bytearray(INDEX_BYTES + capacity))
    return buffer, RingProducer(buffer), RingConsumer(buffer)


def drain(consumer, max_bytes=EVERYTHING):
    return [(kind, session, bytes(payload)) for kind, session, payload in consumer.drain(max_bytes)]


def test_records_arrive_in_order_with_all_they_carry():
    _, producer, consumer = ring()
    sent = [(1, 7, b"one"), (2**32 - 1, 2**32 - 1, b""), (0, 0, bytes(range(256)))]
    for record in sent:
        assert producer.push(*record)
    assert drain(consumer) == sent
    assert drain(consumer) == []
    assert consumer.corrupt == 0


@pytest.mark.parametrize("capacity", [HEADER_BYTES + 1, 100, 101, 997])
def test_records_of_every_length_survive_the_wrap_at_every_offset(capacity):
    _, producer, consumer = ring(capacity)
    for turn in range(3 * capacity):
        payload = bytes((turn + i) % 256 for i in range(turn % (capacity - HEADER_BYTES + 1)))
        assert producer.push(1, 2, payload)
        assert drain(consumer) == [(1, 2, payload)]
    assert consumer.corrupt == 0


def test_a_full_ring_refuses_and_keeps_what_it_has():
    _, producer, consumer = ring(10 * (HEADER_BYTES + 8))
    for number in range(10):
        assert producer.push(number, 0, b"12345678")
    assert not producer.push(10, 0, b"")
    assert [kind for kind, _, _ in drain(consumer, HEADER_BYTES + 8)] == [0]
    assert producer.push(10, 0, b"12345678")
    assert not producer.push(11, 0, b"")
    assert [kind for kind, _, _ in drain(consumer)] == list(range(1, 11))


def test_a_record_that_never_fits_is_the_callers_mistake():
    _, producer, _ = ring(100)
    assert producer.push(1, 0, bytes(100 - HEADER_BYTES))
    with pytest.raises(ValueError, match="101 bytes"):
        producer.push(1, 0, bytes(101 - HEADER_BYTES))


def test_a_ring_without_room_for_a_record_is_refused():
    with pytest.raises(ValueError, match="a ring needs"):
        RingProducer(memoryview(bytearray(INDEX_BYTES + HEADER_BYTES - 1)))
    with pytest.raises(ValueError, match="a ring needs"):
        RingConsumer(memoryview(bytes(4096)))


def test_drain_takes_no_more_than_it_may_but_at_least_one():
    _, producer, consumer = ring()
    for number in range(10):
        producer.push(number, 0, bytes(100))
    size = HEADER_BYTES + 100
    assert len(drain(consumer, 0)) == 1
    assert len(drain(consumer, size)) == 1
    assert len(drain(consumer, size - 1)) == 1
    assert len(drain(consumer, 2 * size - 1)) == 1
    assert len(drain(consumer, 2 * size)) == 2
    assert len(drain(consumer, 2 * size + HEADER_BYTES + 3)) == 2
    assert len(drain(consumer)) == 2
    assert consumer.corrupt == 0


def test_a_payload_is_not_overwritten_by_later_records():
    _, producer, consumer = ring(256)
    producer.push(1, 0, b"a" * 100)
    [(_, _, payload)] = consumer.drain(EVERYTHING)
    for _ in range(10):
        producer.push(1, 0, b"b" * 100)
        consumer.drain(EVERYTHING)
    assert payload == b"a" * 100


class Watched:
    """Stands for the index words and looks at the ring whenever the head is about to be shown."""

    def __init__(self, words, look):
        self.words, self.look = words, look

    def __getitem__(self, index):
        return self.words[index]

    def __setitem__(self, index, value):
        self.look(value)
        self.words[index] = value


@pytest.mark.parametrize("start", [0, 90, 200])
def test_a_record_is_whole_and_fenced_before_the_head_shows_it(start):
    buffer, producer, consumer = ring(256)
    producer.push(0, 0, bytes(start))
    consumer.drain(EVERYTHING)
    payload = bytes(range(100))
    events = []

    def look(head):
        at = head - HEADER_BYTES - len(payload)
        data = bytes(buffer[INDEX_BYTES:])
        stream = bytes(data[i % 256] for i in range(at, head))
        events.append(("head", open_frame(stream)))

    fence = producer._fence
    producer._fence = lambda: (events.append(("fence", None)), fence())
    producer._indices = Watched(producer._indices, look)
    assert producer.push(5, 6, payload)
    assert events == [("fence", None), ("head", (5, 6, payload))]


def test_room_is_given_back_only_after_reading_and_a_fence():
    _, producer, consumer = ring()
    producer.push(1, 0, b"x")
    events = []
    for name in ("_fence", "_read"):
        method = getattr(consumer, name)
        setattr(consumer, name, lambda *a, name=name, method=method: (events.append(name), method(*a))[1])
    consumer._indices = Watched(consumer._indices, lambda _: events.append("tail"))
    assert len(consumer.drain(EVERYTHING)) == 1
    assert events == ["_fence", "_read", "_fence", "tail"]


def test_a_half_written_record_of_a_dead_producer_is_never_seen():
    buffer, producer, consumer = ring()
    producer.push(1, 0, b"before")
    frame = seal_frame(2, 0, HEADER_BYTES + 6, b"never finished")
    at = INDEX_BYTES + HEADER_BYTES + 6
    buffer[at : at + len(frame)] = frame  # and here it died
    assert drain(consumer) == [(1, 0, b"before")]
    successor = RingProducer(buffer)
    assert successor.push(3, 0, b"after")
    assert drain(consumer) == [(3, 0, b"after")]
    assert consumer.corrupt == 0


def test_a_successor_goes_on_where_the_last_end_stopped():
    buffer, producer, consumer = ring(200)
    for number in range(20):
        assert producer.push(number, 0, b"payload")
        assert drain(consumer) == [(number, 0, b"payload")]
        producer, consumer = RingProducer(buffer), RingConsumer(buffer)


def test_skip_drops_what_stands_in_the_ring_and_only_that():
    _, producer, consumer = ring()
    producer.push(1, 0, b"old")
    assert consumer.pending
    consumer.skip()
    assert not consumer.pending
    producer.push(2, 0, b"new")
    assert drain(consumer) == [(2, 0, b"new")]


@pytest.mark.parametrize("byte", range(HEADER_BYTES + 4))
def test_damage_to_any_byte_of_a_record_is_noticed_and_costs_no_later_record(byte):
    buffer, producer, consumer = ring()
    producer.push(1, 2, b"fine")
    producer.push(1, 2, b"hurt")
    producer.push(1, 2, b"lost")
    buffer[INDEX_BYTES + HEADER_BYTES + 4 + byte] ^= 0x40
    assert drain(consumer) == [(1, 2, b"fine")]
    assert consumer.corrupt == 1
    producer.push(1, 2, b"next")
    assert drain(consumer) == [(1, 2, b"next")]
    assert consumer.corrupt == 1


def test_a_sound_record_of_an_earlier_lap_is_not_delivered_again():
    size = HEADER_BYTES + 4
    buffer, producer, consumer = ring(2 * size)
    for number in range(4):
        producer.push(number, 0, b"abcd")
        drain(consumer)
    struct.pack_into("Q", buffer, 0, 5 * size)  # a head that shows bytes not written in this lap
    assert drain(consumer) == []
    assert consumer.corrupt == 1


HEAD, TAIL = 0, 64


@pytest.mark.parametrize("index", [HEAD, TAIL], ids=["head", "tail"])
@pytest.mark.parametrize("wrong", [0, 1, 55, 97, 4096, 8192, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("fill", [0, 1, 3, 50, 400])
def test_a_ring_recovers_from_any_damage_to_its_indices(index, wrong, fill):
    buffer, producer, consumer = ring()
    sent = set()
    for number in range(fill):
        producer.push(number, 0, b"payload")
        sent.add(number)
    struct.pack_into("Q", buffer, index, wrong)
    for number in range(1000, 1004):
        producer.push(number, 0, b"payload")
        sent.add(number)
        assert {kind for kind, _, _ in drain(consumer)} <= sent
    for number in range(2000, 2010):
        assert producer.push(number, 0, b"payload")
        assert drain(consumer) == [(number, 0, b"payload")]


def test_10000_mutations_deliver_no_wrong_record_and_never_stop_the_ring():
    chooser = random.Random(7)
    buffer, producer, consumer = ring(2048)
    sent = {}
    num_delivered = num_harmed = 0
    for turn in range(10_000):
        for _ in range(chooser.randint(0, 4)):
            payload = chooser.randbytes(chooser.choice((0, 1, 8, 64, 300)))
            kind = len(sent)
            sent[kind] = payload
            producer.push(kind, 9, payload)
        corrupt = consumer.corrupt
        if chooser.random() < 0.9:
            # Half of the wounds where there are records, the others anywhere, the indices included.
            used = producer._head - consumer._tail
            if used > 0 and chooser.random() < 0.5:
                at = INDEX_BYTES + (consumer._tail + chooser.randrange(used)) % 2048
            else:
                at = chooser.choice((chooser.randrange(len(buffer)), chooser.randrange(8), TAIL))
            buffer[at] ^= chooser.randrange(1, 256)
        for kind, session, payload in consumer.drain(chooser.choice((0, 500, EVERYTHING))):
            assert (session, payload) == (9, sent[kind]), f"turn {turn}"
            num_delivered += 1
        num_harmed += consumer.corrupt - corrupt
    assert num_harmed > 2_000
    assert num_delivered > 2_000
    for number in range(3):
        producer.push(number, 9, sent[number])
        consumer.drain(EVERYTHING)
    assert producer.push(1, 9, b"healed")
    assert drain(consumer) == [(1, 9, b"healed")]


@pytest.mark.parametrize("cut", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 2])
def test_a_cut_frame_is_not_opened(cut):
    assert open_frame(seal_frame(1, 2, 3, b"abc")[:cut]) is None
    assert open_frame(seal_frame(1, 2, 3, b"abc")) == (1, 2, b"abc")
