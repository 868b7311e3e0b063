"""The benchmarks of shared noise, without models: agreement of two distributions, a server's columns, turns of arms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.coupling import NAMES, agreement, arguments, ranks, server_columns
from benchmarks.draw_scores import Floats
from benchmarks.sampling_bench import rows_of, take_turns

SEEDS = range(400)


def logits(*probs: float) -> Floats:
    """Two places with the same distribution."""
    return np.log(np.array([probs, probs], np.float32))


def test_two_models_that_agree_draw_the_same_token_always() -> None:
    both = logits(0.5, 0.3, 0.2)
    found = agreement(both, both.copy(), 1.0, 10, range(5))
    assert found.keys() == set(NAMES)
    assert found["one_hot"] == pytest.approx(2 * 0.5)
    assert found["optimum"] == pytest.approx(2)
    assert found["shared_noise"] == found["covered_4_noise"] == 2


def test_agreement_lies_between_what_theory_allows_and_the_rest_is_exact() -> None:
    target, draft = (0.5, 0.2, 0.1, 0.1, 0.05, 0.05), (0.2, 0.5, 0.05, 0.05, 0.1, 0.1)
    found = {name: value / 2 for name, value in agreement(logits(*target), logits(*draft), 1.0, 3, SEEDS).items()}
    assert found["one_hot"] == pytest.approx(0.2)
    assert found["optimum"] == pytest.approx(0.6)
    # Daliri et al.: Gumbel coupling keeps at least (1 - TV) / (1 + TV).
    assert 0.6 / 1.4 - 0.05 < found["shared_noise"] <= 0.6 + 0.05
    exact = sum(
        1 / sum(max(a / b, c / d) for a, c in zip(target, draft, strict=True)) for b, d in zip(target, draft, strict=True)
    )
    assert found["shared_noise"] == pytest.approx(exact, abs=0.05)
    assert found["covered_4"] == pytest.approx(0.5 + 0.2 + 0.05 + 0.05)
    assert found["shared_noise"] < found["covered_4_noise"] <= found["covered_8_noise"] == pytest.approx(1)


def test_a_lower_temperature_is_that_of_both_models() -> None:
    found = agreement(logits(0.8, 0.2), logits(0.6, 0.4), 0.5, 0, range(2))
    assert found["one_hot"] == pytest.approx(2 * 0.64 / 0.68)


def test_the_rank_of_a_token_is_the_number_of_better_ones() -> None:
    keys = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 5.0]], np.float32)
    assert ranks(keys, np.array([2, 2])).tolist() == [1, 0]


def test_counters_that_a_server_lacks_give_empty_columns() -> None:
    assert set(server_columns({}).values()) == {None}
    counted = {
        "vllm:double_draft_first_examples_total": 200.0,
        "vllm:double_draft_first_accepted_total": 90.0,
        "vllm:double_draft_listed_accepted_total": 160.0,
    }
    found = server_columns(counted)
    assert (found["server_first"], found["server_covered_3"], found["server_examples"]) == (0.45, 0.8, 200)
    assert server_columns(dict.fromkeys(counted, 0.0))["server_first"] is None
    assert found.keys() == server_columns({}).keys()


def test_nothing_is_coupled_at_temperature_0() -> None:
    assert arguments([]).temperature == [0.7, 1.0]
    with pytest.raises(SystemExit):
        arguments(["--temperature", "0", "1"])


def test_arms_take_turns_and_each_is_compared_within_its_turn() -> None:
    order: list[str] = []
    times = itertools.count()
    found = take_turns(
        {"double": lambda: order.append("double"), "vllm": lambda: order.append("vllm")}, 2, lambda: float(next(times))
    )
    assert order == ["vllm", "double", "double", "vllm", "vllm", "double"]
    assert found == {"double": [1.0, 1.0], "vllm": [1.0, 1.0]}
    table = {row["arm"]: row for row in rows_of({"double": [0.002, 0.03, 0.001], "vllm": [0.001, 0.01, 0.001]})}
    assert table["double"]["over_vllm"] == pytest.approx(2)
    assert (table["vllm"]["ms_p50"], table["vllm"]["over_vllm"]) == (1.0, 1.0)
