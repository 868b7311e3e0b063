"""Any message survives the wire; no bytes whatever make a decoder do more than refuse."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_double.transport import messages
from vllm_double.transport.messages import (
    Admit,
    Commit,
    Forget,
    MessageError,
    Release,
    decode_commands,
    decode_reports,
)


def only(kind, payload):
    [command] = decode_commands(kind, payload)
    return command


U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)
I32 = st.integers(-(2**31), 2**31 - 1)
TOKENS = st.lists(I32, max_size=40).map(lambda values: np.array(values, np.int32))
PROBS = st.floats(0, 1, width=32)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


FRACTION = st.floats(0, 1)
SAMPLING = st.tuples(I64, U32, FRACTION.filter(lambda top_p: top_p > 0), FRACTION)


@given(U64, U32, TOKENS, st.floats(0, 1e6), U32, st.lists(I32, max_size=20), TEXT, U32, SAMPLING)
def test_any_admit_survives(handle, base, tokens, temperature, max_length, stops, tenant, epoch, sampling):
    sent = Admit(handle, base, tokens, temperature, max_length, tuple(stops), tenant, epoch, *sampling)
    got = only(*messages.encode(sent))
    for field in dataclasses.fields(Admit):
        if field.name != "tokens":
            assert getattr(got, field.name) == getattr(sent, field.name)
    np.testing.assert_array_equal(got.tokens, tokens)


@given(U64, U32, TOKENS, st.lists(st.tuples(I32, PROBS), max_size=20))
def test_any_commit_survives(handle, keep, tokens, chain):
    chain_tokens = np.array([token for token, _ in chain], np.int32)
    probs = np.array([prob for _, prob in chain], np.float32)
    got = only(*messages.encode(Commit(handle, keep, tokens, chain_tokens, probs)))
    assert (got.handle, got.keep) == (handle, keep)
    np.testing.assert_array_equal(got.tokens, tokens)
    np.testing.assert_array_equal(got.chain, chain_tokens)
    np.testing.assert_array_equal(got.chain_probs, probs)


@given(st.integers(0, 7), st.binary(max_size=300))
def test_garbage_is_refused_or_is_a_command(kind, payload):
    try:
        command = only(kind, payload)
    except MessageError:
        return
    assert isinstance(command, Admit | Commit | Release | Forget)
    assert messages.encode(command) == (kind, payload)


@given(st.lists(st.tuples(st.integers(0, 7), st.binary(max_size=200)), max_size=6))
def test_garbage_among_reports_costs_no_later_one(records):
    good = messages.encode(messages.WorkerStats({"alive": 1.0}))
    reports = decode_reports([*records, good])
    assert len(reports) <= len(records) + 1
    assert reports[-1] == messages.WorkerStats({"alive": 1.0})
