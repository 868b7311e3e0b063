import random
import struct

import numpy as np
import pytest

from vllm_double.transport import messages
from vllm_double.transport.messages import (
    MAX_CHILDREN,
    MAX_TOKENS,
    NODE_DTYPE,
    Admit,
    Commit,
    MessageError,
    Nodes,
    Release,
    WorkerStats,
    decode_commands,
    decode_reports,
    encode,
)


def only(kind, payload):
    [command] = decode_commands(kind, payload)
    return command


def ints(*values):
    return np.array(values, np.int32)


def floats(*values):
    return np.array(values, np.float32)


def nodes(num, count=MAX_CHILDREN, prob=0.5):
    records = np.zeros(num, NODE_DTYPE)
    records["handle"] = np.arange(num) + 1
    records["count"] = count
    records["tokens"] = np.arange(num * MAX_CHILDREN).reshape(num, MAX_CHILDREN)
    records["probs"] = prob
    return records


def admit(**changes):
    fields = {
        "handle": 2**64 - 1,
        "base": 5,
        "tokens": ints(1, 2, 3),
        "temperature": 0.7,
        "max_length": 4096,
        "stop_token_ids": (2, -1),
        "tenant": "Grüße",
        "epoch": 2**32 - 1,
    }
    return Admit(**(fields | changes))


def commit(**changes):
    fields = {
        "handle": 3,
        "keep": 7,
        "tokens": ints(4, 5),
        "chain": ints(6, 7, 8),
        "chain_probs": floats(0.5, 0.25, 0),
    }
    return Commit(**(fields | changes))


def test_node_record_is_packed_so_that_both_ends_agree():
    assert NODE_DTYPE.itemsize == 8 + 8 + 4 + 4 + 4 * MAX_CHILDREN + 4 * MAX_CHILDREN


@pytest.mark.parametrize("tokens", [ints(), ints(1, 2, 3), np.arange(MAX_TOKENS, dtype=np.int32)])
@pytest.mark.parametrize("stops", [(), (0,), (2, 2**31 - 1, -1)])
@pytest.mark.parametrize("tenant", ["", "a", "Grüße", "x" * 1000])
def test_admit_loses_nothing_on_the_wire(tokens, stops, tenant):
    sent = admit(tokens=tokens, stop_token_ids=stops, tenant=tenant)
    got = only(*encode(sent))
    assert isinstance(got, Admit)
    assert got.tokens.dtype == np.int32
    np.testing.assert_array_equal(got.tokens, tokens)
    assert (got.handle, got.base, got.temperature, got.max_length) == (2**64 - 1, 5, 0.7, 4096)
    assert (got.stop_token_ids, got.tenant, got.epoch) == (stops, tenant, 2**32 - 1)


@pytest.mark.parametrize("num_tokens", [0, 1, 6])
@pytest.mark.parametrize("num_chain", [0, 1, 16])
def test_commit_loses_nothing_on_the_wire(num_tokens, num_chain):
    tokens = np.arange(num_tokens, dtype=np.int32)
    chain = np.arange(num_chain, dtype=np.int32) + 100
    probs = np.linspace(0, 1, num_chain, dtype=np.float32)
    got = only(*encode(commit(tokens=tokens, chain=chain, chain_probs=probs)))
    assert isinstance(got, Commit)
    assert (got.handle, got.keep) == (3, 7)
    np.testing.assert_array_equal(got.tokens, tokens)
    np.testing.assert_array_equal(got.chain, chain)
    np.testing.assert_array_equal(got.chain_probs, probs)


def test_release_loses_nothing_on_the_wire():
    assert only(*encode(Release(2**64 - 1))) == Release(2**64 - 1)


def test_stats_lose_nothing_on_the_wire():
    sent = WorkerStats({"iterations": 12.0, "ratio": 0.1, "Größe": -3.5})
    assert decode_reports([encode(sent)]) == [sent]


def test_nodes_of_many_records_come_first_in_one_message_in_order():
    first, second = nodes(3), nodes(2, count=1)
    stats = WorkerStats({"a": 1.0})
    reports = decode_reports([encode(Nodes(first)), encode(stats), encode(Nodes(second))])
    assert len(reports) == 2
    np.testing.assert_array_equal(reports[0].records, np.concatenate([first, second]))
    assert reports[1] == stats


def test_decoded_arrays_own_writable_aligned_memory():
    kind, payload = encode(commit())
    buffer = bytearray(b"x" + payload)
    got = only(kind, memoryview(buffer)[1:])
    buffer[:] = bytes(len(buffer))
    np.testing.assert_array_equal(got.chain, [6, 7, 8])
    for array in (got.tokens, got.chain, got.chain_probs):
        assert array.flags.writeable
        assert array.flags.aligned
    [report] = decode_reports([encode(Nodes(nodes(2)))])
    assert report.records.flags.writeable


def test_empty_nodes_are_no_report():
    assert decode_reports([encode(Nodes(nodes(0)))]) == []


@pytest.mark.parametrize(
    "message",
    [
        admit(tokens=np.zeros(3, np.int64)),
        admit(tokens=np.zeros((1, 3), np.int32)),
        admit(tokens=np.zeros(MAX_TOKENS + 1, np.int32)),
        admit(handle=-1),
        admit(handle=2**64),
        admit(temperature=float("nan")),
        admit(temperature=-1.0),
        admit(temperature=float("inf")),
        admit(stop_token_ids=(2**31,)),
        admit(tenant="x" * 70_000),
        admit(tenant="\ud800"),
        commit(chain=ints(1)),
        commit(chain_probs=np.zeros(3, np.float64)),
        commit(tokens=np.zeros(MAX_TOKENS + 1, np.int32)),
        commit(keep=-1),
        Release(-1),
        Nodes(np.zeros(3, np.int32)),
        WorkerStats({"a": float("nan")}),
        WorkerStats({"a": float("inf")}),
        WorkerStats({"a": np.float32(1)}),
    ],
)
def test_a_message_that_does_not_fit_the_wire_is_refused_by_its_sender(message):
    with pytest.raises(MessageError):
        encode(message)


@pytest.mark.parametrize("message", [admit(), commit(), Release(1)])
def test_command_of_a_wrong_size_is_refused(message):
    kind, payload = encode(message)
    for damaged in (payload[:-1], payload + b"\0", payload[: len(payload) // 2], b""):
        with pytest.raises(MessageError):
            only(kind, damaged)


@pytest.mark.parametrize("kind", [0, messages.NODES, messages.STATS, 6, 2**32 - 1])
def test_unknown_kind_of_command_is_refused(kind):
    with pytest.raises(MessageError):
        only(kind, encode(Release(1))[1])


def test_command_with_more_tokens_than_a_command_may_have_is_refused():
    num = MAX_TOKENS + 1
    payload = messages._COMMIT.pack(1, 0, num, 0, 0) + bytes(4 * num)
    with pytest.raises(MessageError):
        only(messages.COMMIT, payload)


def test_admit_with_a_tenant_that_is_no_text_is_refused():
    kind, payload = encode(admit(tenant="ab"))
    with pytest.raises(MessageError):
        only(kind, payload[:-2] + b"\xff\xff")


NAN, INF = float("nan"), float("inf")
NO_SAMPLING = [
    *(("temperature", value) for value in (-0.1, NAN, INF)),
    *(("top_p", value) for value in (0.0, -0.5, 1.0001, NAN, INF)),
    *(("min_p", value) for value in (-0.001, 1.0001, NAN, INF)),
]


@pytest.mark.parametrize(("name", "value"), NO_SAMPLING)
def test_admit_with_parameters_that_nobody_can_sample_by_is_refused_at_both_ends(name, value):
    with pytest.raises(MessageError):
        encode(admit(**{name: value}))
    kind, payload = encode(admit(temperature=0.625, top_p=0.75, min_p=0.125))
    wire = {"temperature": struct.pack("<d", 0.625), "top_p": struct.pack("<d", 0.75), "min_p": struct.pack("<d", 0.125)}
    assert payload.count(wire[name]) == 1
    with pytest.raises(MessageError):
        only(kind, payload.replace(wire[name], struct.pack("<d", value)))


@pytest.mark.parametrize(("name", "value"), [("seed", 1 << 63), ("seed", -(1 << 63) - 1), ("top_k", -1), ("top_k", 1 << 32)])
def test_admit_with_a_seed_or_top_k_beyond_the_wire_is_refused_by_its_sender(name, value):
    with pytest.raises(MessageError):
        encode(admit(**{name: value}))


def test_commit_with_probabilities_that_are_not_finite_is_refused():
    kind, payload = encode(commit(chain_probs=floats(0.5, np.nan, 0)))
    with pytest.raises(MessageError):
        only(kind, payload)


@pytest.mark.parametrize(("count", "prob"), [(MAX_CHILDREN + 1, 0.5), (2**32 - 1, 0.5), (1, np.nan), (1, np.inf), (3, -0.1)])
def test_bad_nodes_cost_only_their_own_record(count, prob):
    good = nodes(2)
    records = [encode(Nodes(good)), encode(Nodes(nodes(1, count, prob))), encode(Nodes(good))]
    reports = decode_reports(records)
    np.testing.assert_array_equal(reports[0].records, np.concatenate([good, good]))


def test_entries_behind_the_count_of_a_node_mean_nothing():
    records = nodes(1, count=2)
    records["probs"][:, 2:] = np.nan
    [report] = decode_reports([encode(Nodes(records))])
    assert len(report.records) == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"a": "b"}',
        b'{"a": null}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1' + b"0" * 400 + b"}",
        b"[" * 100_000,
        b"\xff\xfe\xff",
    ],
)
def test_statistics_that_are_none_are_skipped(payload):
    good = encode(WorkerStats({"a": 1.0}))
    assert decode_reports([(messages.STATS, payload), good]) == [WorkerStats({"a": 1.0})]


def test_10000_damaged_payloads_never_crash_a_decoder():
    chooser = random.Random(1)
    wires = [encode(m) for m in (admit(), commit(), Release(5), Nodes(nodes(3)), WorkerStats({"a": 1.5}))]
    num_refused = 0
    for _ in range(10_000):
        kind, payload = chooser.choice(wires)
        damaged = bytearray(payload)
        for _ in range(chooser.randint(1, 4)):
            damaged[chooser.randrange(len(damaged))] = chooser.randrange(256)
        if chooser.random() < 0.3:
            damaged = damaged[: chooser.randrange(len(damaged))]
        if kind in (messages.NODES, messages.STATS):
            num_refused += not decode_reports([(kind, bytes(damaged))])
        else:
            try:
                only(kind, bytes(damaged))
            except MessageError:
                num_refused += 1
    assert 2_000 < num_refused < 10_000
