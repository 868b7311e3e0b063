"""Sampled parity without a server: which prompts a cell gets, the scores of a draw, and what a difference is judged by."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from double_kernels import gumbel_noise, sample_with_noise

from benchmarks import rows
from benchmarks.arms import Arm
from benchmarks.client import Completion, Request, Round
from benchmarks.draw_scores import Floats, gap, noise, processed, scores
from benchmarks.parity import arguments, divergences, parity_row
from benchmarks.sampled_cells import CONDITIONS, Cell, cells_of, children, requests_of, split
from benchmarks.sampled_parity import Judgement, ask_several, judge, num_equal_pairs, raw_logits, sampled_columns

VOCAB = 50
LOGITS: Floats = np.random.default_rng(3).normal(0, 3, VOCAB).astype(np.float32)


def request(**sampling: float) -> Request:
    return Request("a", (1, 2, 2), 8, 0.7, seed=5, **sampling)  # type: ignore[arg-type]


def test_cells_use_every_prompt_and_are_as_large_as_wanted() -> None:
    options = arguments(["--sampled"])
    cells = cells_of(options.temperature, options.conditions)
    chosen = split(options.num_prompts, len(cells), options.per_cell)
    assert {index for indices in chosen for index in indices} == set(range(128))
    for condition in CONDITIONS:
        seen = [index for cell, part in zip(cells, chosen, strict=True) if cell.condition == condition for index in part]
        assert len(set(seen)) >= 16
    assert split(6, 4, 3) == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert split(5, 2, 4) == [[0, 1, 2, 3], [4, 0, 1, 2]]


@pytest.mark.parametrize(("num_prompts", "num_cells", "per_cell"), [(9, 2, 4), (4, 1, 5), (4, 4, 0)])
def test_a_split_that_leaves_prompts_out_or_repeats_them_in_a_cell_is_refused(
    num_prompts: int, num_cells: int, per_cell: int
) -> None:
    with pytest.raises(ValueError, match=r"prompts|leave out"):
        split(num_prompts, num_cells, per_cell)
    command = ["--sampled", "--num-prompts", str(num_prompts), "--per-cell", str(per_cell), "--conditions", "bare"]
    with pytest.raises(SystemExit):
        arguments([*command, "--temperature", *["1"] * num_cells])


def test_requests_of_a_cell_have_its_condition_and_the_seed_of_their_prompt() -> None:
    prompts = [Request(str(index), (index,), 8, ignore_eos=index == 2) for index in range(4)]
    found = requests_of(prompts, Cell(1.5, "penalties"), [3, 2], seed=100)
    assert [(one.id, one.seed, one.temperature, one.ignore_eos) for one in found] == [
        ("3", 103, 1.5, False),
        ("2", 102, 1.5, True),
    ]
    assert {(one.repetition_penalty, one.presence_penalty, one.frequency_penalty) for one in found} == {(1.1, 0.3, 0.2)}
    assert [one.seed for one in children(found[0], 3)] == [103, 104, 105]


@pytest.mark.parametrize(
    "sampling",
    [{}, {"top_k": 7}, {"top_p": 0.9}, {"top_k": 9, "top_p": 0.8}, CONDITIONS["penalties"]],
    ids=["bare", "top_k", "top_p", "both", "penalties"],
)
def test_logits_are_processed_as_vllm_does(sampling: dict[str, float]) -> None:
    from vllm.v1.sample.ops.penalties import apply_all_penalties
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    one, output = request(**sampling), [4, 4, 9]
    wanted = torch.from_numpy(LOGITS.copy())[None]
    if one.repetition_penalty is not None:
        penalties = [one.presence_penalty, one.frequency_penalty, one.repetition_penalty]
        tensors = [torch.tensor([value]) for value in penalties]
        wanted = apply_all_penalties(wanted, torch.tensor([[1, 2, 2]]), *tensors, [output])
    wanted = wanted / one.temperature
    top_k = None if one.top_k is None else torch.tensor([one.top_k])
    top_p = None if one.top_p is None else torch.tensor([one.top_p])
    wanted = apply_top_k_top_p_pytorch(wanted, top_k, top_p)
    found = processed(LOGITS, one, one.prompt, output)  # type: ignore[arg-type]
    assert np.isneginf(found).any() == bool({"top_k", "top_p"} & set(sampling))
    np.testing.assert_allclose(found, wanted[0].numpy(), rtol=1e-6)


def test_the_best_score_is_the_token_that_is_drawn_one_position_before_its_own() -> None:
    output = [4, 9]
    found = scores(LOGITS, request(), (1, 2, 2), output)
    (drawn,) = sample_with_noise(torch.from_numpy(LOGITS[None] / np.float32(0.7)), torch.tensor([5]), torch.tensor([4]))
    assert found.argmax() == drawn
    for row, (seed, position) in enumerate([(5, 4), (-1, 1 << 31)]):
        wanted = gumbel_noise(np.array([seed]), np.array([position]), np.arange(VOCAB))
        assert (noise([5, -1], [4, 1 << 31], VOCAB)[row] == wanted).all()
    with pytest.raises(ValueError, match="no seed"):
        scores(LOGITS, Request("a", (1,), 8, 0.7), (1,), [])


def test_the_gap_is_that_of_the_two_best_scores_or_of_a_worse_drawn_token() -> None:
    found = np.array([1.0, 3.0, 2.5, -np.inf], np.float32)
    assert gap(found, [1, 2]) == gap(found, [2, 1]) == pytest.approx(0.5)
    assert gap(found, [1, 0]) == gap(found, [2, 0]) == pytest.approx(2)
    assert gap(found, [1, 3]) == math.inf


def completion(tokens: list[int], finish_reason: str = "length") -> Completion:
    return Completion("a", tokens, "", finish_reason, 0.1, 1.0, [0.1, 0.2])


def judged(a: Completion, b: Completion, bound: float, logits: Floats) -> Judgement:
    one, asked = request(), []

    def read(_: Request, common: Sequence[int]) -> Floats:
        asked.append(list(common))
        return logits

    (found,) = judge(divergences([one], [a], [b]), [one], read, lambda: bound)
    assert asked in ([], [a.tokens[: found.position]])
    return found


def test_a_difference_is_explained_if_both_tokens_lie_within_the_noise_of_the_forward() -> None:
    best = scores(LOGITS, request(), (1, 2, 2), [4])
    first, second = (int(token) for token in np.argsort(-best)[:2])
    # A logit that brings the second token to within 0.001 of the first.
    logits = LOGITS.copy()
    logits[second] += (best[first] - best[second]) * np.float32(0.7) - np.float32(0.001)
    found = judged(completion([4, first, 7]), completion([4, second, 7]), 0.0011, logits)
    assert (found.position, found.is_explained) == (1, True)
    assert found.gap == pytest.approx(0.001, rel=0.02)
    assert not judged(completion([4, first]), completion([4, second]), 0.0009, logits).is_explained
    third = int(np.argsort(-best)[2])
    assert not judged(completion([4, first]), completion([4, third]), 0.0011, logits).is_explained


def test_a_text_that_ends_otherwise_is_not_explained() -> None:
    found = judged(completion([4, 5], "stop"), completion([4, 5], "length"), 1e9, LOGITS)
    assert (found.position, found.gap, found.is_explained) == (2, None, False)
    assert not judged(completion([4, 5]), completion([4]), 1e9, LOGITS).is_explained


def test_four_texts_are_compared_in_pairs_and_have_the_seeds_that_vllm_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(url: str, one: Request, **parameters: object) -> list[dict[str, object]]:
        assert (url, parameters) == ("there", {"n": 4})
        return [{"token_ids": [index % 3], "text": "x", "finish_reason": "length"} for index in range(4)]

    monkeypatch.setattr("benchmarks.sampled_parity.choices", answer)
    found = ask_several("there", [request(), request()], 4)
    assert [one.id for one in found.completions[:4]] == ["a/0", "a/1", "a/2", "a/3"]
    assert num_equal_pairs(found.completions, 4) == 2
    assert num_equal_pairs(found.completions, 2) == 0


def test_raw_logits_are_asked_for_behind_the_common_text_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(url: str, one: Request, **parameters: object) -> list[dict[str, object]]:
        asked.append((one, parameters))
        return [{"logprobs": {"top_logprobs": [{"token_id:2": 1.5, "token_id:0": -3.0}]}}]

    monkeypatch.setattr("benchmarks.sampled_parity.choices", answer)
    assert raw_logits("there", request(), [7, 8], 3).tolist() == [-3.0, -math.inf, 1.5]
    ((one, parameters),) = asked
    assert (one.prompt, one.max_tokens, one.temperature, one.drafts) == ((1, 2, 2, 7, 8), 1, 0.0, False)
    assert parameters == {"logprobs": 3, "return_tokens_as_token_ids": True}


def test_rows_of_greedy_and_of_sampled_parity_have_the_same_columns_as_the_file(tmp_path: Path) -> None:
    options = arguments([])
    round_ = Round([completion([1, 2])], 1.0)
    row = parity_row(options, Arm("double"), 4, 8, round_, round_, [])
    differences = [Judgement("a", 3, math.inf, 0.1), Judgement("b", 1, 0.05, 0.1), Judgement("c", 2, None, None)]
    columns = sampled_columns(Cell(0.7, "top_p"), 9, differences)
    assert columns.keys() <= row.keys()
    assert columns["explained"] == 1
    assert columns["largest_gap"] == math.inf
    assert json.loads(str(columns["gaps"])) == ["inf", 0.05, None]
    with (rows.RESULTS / "parity.csv").open(newline="") as file:
        header = next(csv.reader(file))
    wanted = [*row, "tokens_per_forward", "acceptance", *rows.provenance("benchmarks.parity")]
    assert [column for column in wanted if column in header] == header
