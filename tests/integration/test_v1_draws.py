"""Where V1's draws lie in their requests' noise: seeds that all ranks agree on, and positions. Without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams

from vllm_double.integration.rank import as_int64
from vllm_double.integration.v1 import DoubleProposer
from vllm_double.integration.v1_sampling import _Expansion


def rank(seed: int = 0, data_parallel_index: int = 0) -> Any:
    """A rank of a target worker that proposes nothing."""
    one = object.__new__(DoubleProposer)
    one._seeds, one._num_scheduled, one._proposer = {}, {}, None
    one._new_seeds = np.random.default_rng([seed, data_parallel_index])
    return one


def step(new: Sequence[tuple[str, int | None]] = (), finished: Sequence[str] = (), scheduled: Any = None) -> Any:
    requests = [SimpleNamespace(req_id=name, sampling_params=SamplingParams(seed=seed)) for name, seed in new]
    return SimpleNamespace(finished_req_ids=finished, scheduled_new_reqs=requests, num_scheduled_tokens=scheduled or {})


def batch(**computed: int) -> Any:
    """Requests in the batch's order, with the tokens that are in the KV cache."""
    cached = np.array([*computed.values(), 77, 77], np.int32)  # the array is longer than the batch
    return SimpleNamespace(req_ids=list(computed), num_computed_tokens_cpu=cached, generators={})


def test_ranks_agree_on_the_seeds_of_requests_that_name_none() -> None:
    first, second = rank(), rank()
    for one in (step([("a", None), ("b", 7), ("c", None)]), step([("d", None)], finished=["a"]), step([("a", None)])):
        seeds = []
        for each in (first, second):
            each._follow_seeds(one)
            seeds.append(dict(each._seeds))
        assert seeds[0] == seeds[1]
    assert first._seeds.keys() == {"a", "b", "c", "d"} and first._seeds["b"] == 7
    assert len(set(first._seeds.values())) == 4


def test_engines_of_other_data_or_another_seed_draw_other_seeds() -> None:
    drawn = set()
    for one in (rank(), rank(seed=1), rank(data_parallel_index=1)):
        one._follow_seeds(step([("a", None)]))
        drawn.add(one._seeds["a"])
    assert len(drawn) == 3


def test_a_request_that_comes_again_under_its_name_has_a_seed_of_its_own() -> None:
    one = rank()
    one._follow_seeds(step([("a", 3)]))
    one._follow_seeds(step([("a", 4)], finished=["a"]))
    assert one._seeds == {"a": 4}
    one._follow_seeds(step(finished=["a", "never seen"]))
    assert one._seeds == {}


def test_positions_are_those_of_the_last_tokens_that_are_read() -> None:
    one = rank()
    requests = [("chunk", 1), ("whole", 2), ("decoding", 3), ("drafted", -4)]
    scheduled = {"chunk": 64, "whole": 10, "decoding": 1, "drafted": 1 + 5}
    one.follow_step(SimpleNamespace(input_batch=batch()), step(requests, scheduled=scheduled))
    draws = one._draws(batch(drafted=30, chunk=128, whole=0, decoding=17))
    assert draws.seeds.tolist() == [-4, 1, 2, 3] and draws.seeds.dtype == draws.last_positions.dtype == np.int64
    # The forward reads 30 .. 35 of the drafted text, 128 .. 191, 0 .. 9, and 17.
    assert draws.last_positions.tolist() == [35, 191, 9, 17]


def test_rows_behind_draft_tokens_have_the_positions_that_they_would_have_without() -> None:
    expansion = _Expansion([5, 0, 2])
    positions = expansion.positions(np.array([35, 17, 9]))
    assert positions.tolist() == [30, 31, 32, 33, 34, 35, 17, 7, 8, 9]
    assert expansion.owners.tolist() == [0] * 6 + [1] + [2] * 3
    assert [expansion.rows_of(request) for request in range(3)] == [range(6), range(6, 7), range(7, 10)]


def test_a_position_does_not_depend_on_how_the_text_came_there() -> None:
    """The last token of a prompt of 50, read in chunks, at once, or as a chain that was accepted."""
    for computed, scheduled, chain in ((0, 50, 0), (32, 18, 0), (49, 1, 0), (45, 5, 4)):
        one = rank()
        one.follow_step(SimpleNamespace(input_batch=batch()), step([("a", 1)], scheduled={"a": scheduled}))
        positions = _Expansion([chain]).positions(one._draws(batch(a=computed)).last_positions)
        assert positions[-1] == 49


def test_generators_of_the_batch_are_dropped() -> None:
    """On a CPU they cannot skip the chunks of a prompt, and nothing is drawn from them."""
    runner = SimpleNamespace(input_batch=batch())
    runner.input_batch.generators[0] = object()
    rank().follow_step(runner, step())
    assert runner.input_batch.generators == {}


def test_any_seed_is_taken_modulo_two_to_the_64() -> None:
    for seed in (0, 1, -1, (1 << 63) - 1, -(1 << 63)):
        assert as_int64(seed) == seed
    assert as_int64(1 << 63) == -(1 << 63)
    assert as_int64((1 << 64) + 5) == 5
    assert as_int64(-(1 << 64) - 1) == -1
    assert np.array([as_int64(12345678901234567890)]).dtype == np.int64
