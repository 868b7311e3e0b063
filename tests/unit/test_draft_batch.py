"""What a flat batch says of its outputs, against its rows, one by one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.engine import FakeEngine, count_outputs, hashed_logits, rows_of
from vllm_double.draft.engine.base import Batch, Row


@st.composite
def rows(draw: st.DrawFn) -> Row:
    tokens = draw(st.lists(st.integers(0, 99), min_size=1, max_size=5))
    start = draw(st.integers(0, 12))
    num_pages = -(-(start + len(tokens)) // 4)
    return Row(
        pages=draw(st.lists(st.integers(0, 63), min_size=num_pages, max_size=num_pages)),
        start=start,
        tokens=tokens,
        num_outputs=draw(st.integers(0, len(tokens))),
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0])),
        seed=draw(st.integers(-(1 << 63), (1 << 63) - 1)),
        noise_scale=draw(st.sampled_from([0.0, 0.0, 0.5, 1.5])),
        top_k=draw(st.sampled_from([0, 0, 1, 40])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.5])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.25])),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(rows(), max_size=6))
def test_outputs_are_those_of_the_rows(all_rows: list[Row]) -> None:
    batch = Batch.of(all_rows)
    places, positions, sampling, all_positions, slots = [], [], [], [], []
    place = 0
    for row in all_rows:
        for index in range(len(row.tokens)):
            if index >= len(row.tokens) - row.num_outputs:
                places.append(place)
                positions.append(row.start + index)
                sampling.append((row.seed, row.temperature, row.noise_scale, row.top_k, row.top_p, row.min_p))
            all_positions.append(row.start + index)
            slots.append(4 * row.pages[(row.start + index) // 4] + (row.start + index) % 4)
            place += 1
    assert batch.positions.tolist() == all_positions
    assert batch.slot_mapping(4).tolist() == slots
    assert batch.output_indices.tolist() == places
    assert batch.output_positions.tolist() == positions
    assert batch.output_sampling.tolist() == sampling
    assert batch.temperatures.tolist() == [row.temperature for row in all_rows]
    assert batch.is_sampled == any(row.noise_scale > 0 for row in all_rows)
    assert batch.is_filtered == any(row.top_k > 0 or row.top_p < 1 or row.min_p > 0 for row in all_rows)
    engine = FakeEngine(hashed_logits(100), vocab_size=100, num_pages=64, page_size=4, max_length=64)
    assert count_outputs(batch, engine) == len(places)


@settings(max_examples=40, deadline=None)
@given(st.lists(rows(), max_size=6))
def test_a_batch_gives_back_its_rows(all_rows: list[Row]) -> None:
    again = rows_of(Batch.of(all_rows))
    assert len(again) == len(all_rows)
    for row, other in zip(all_rows, again, strict=True):
        assert list(other.pages)[: len(row.pages)] == list(row.pages)
        assert (other.start, list(other.tokens), other.num_outputs) == (row.start, list(row.tokens), row.num_outputs)
        assert (other.seed, other.temperature, other.noise_scale) == (row.seed, row.temperature, row.noise_scale)
        assert (other.top_k, other.top_p, other.min_p) == (row.top_k, row.top_p, row.min_p)
