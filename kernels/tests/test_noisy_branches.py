"""top_branches with noise and with support, and the search that it uses on a CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from double_kernels import Noise, Support, gumbel_noise, ranking, sample_with_noise, top_branches
from double_kernels.sample_with_noise import sample_with_noise_reference
from double_kernels.support import NUM_INSPECTED
from double_kernels.top_branches import top_branches_reference
from double_kernels.triton_top_branches import top_branches_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums of exponentials in another order; on a CPU torch's are long chains
TOPS = [pytest.param(top_branches_reference, id="reference"), pytest.param(top_branches_triton, id="kernel")]
tops = pytest.mark.parametrize("top", TOPS)
# Several of a row's bounds: none, each alone, one within the other, and one that lies behind the inspected tokens.
BOUNDS = [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (9, 0.5, 0.0), (4, 0.99, 0.2), (50, 0.3, 0.01),
    (NUM_INSPECTED, 1.0, 0.0), (NUM_INSPECTED + 1, 1.0, 0.0), (1 << 30, 1.0, 1e-30), (-1, 0.0, 0.0), (3, 1e-6, 0.0),
]  # fmt: skip
SCALES = [0.0, 1.0, 0.5, 2.0, 0.0, 0.01]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def noise_of(num_rows: int, scales: list[float] | None = None) -> Noise:
    """Scales in turn, odd seeds and positions."""
    generator = torch.Generator().manual_seed(num_rows)
    chosen = torch.tensor([(scales or SCALES)[row % len(scales or SCALES)] for row in range(num_rows)])
    seeds = torch.randint(-(1 << 62), 1 << 62, (num_rows,), generator=generator)
    return Noise(*on_device(seeds, torch.arange(num_rows) * 777 - 1, chosen))


def support_of(bounds: list[tuple[int, float, float]]) -> Support:
    top_k, top_p, min_p = zip(*bounds, strict=True)
    return Support(*on_device(torch.tensor(top_k, dtype=torch.int32), torch.tensor(top_p), torch.tensor(min_p)))


def slow_floor(values: list[float], probs: list[float], top_k: int, top_p: float, min_p: float) -> float:
    """The lowest logit that is kept, token by token."""
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))[:NUM_INSPECTED]
    kept = [token for token in order if probs[token] >= min_p * probs[order[0]]]
    has_top_k = 0 < top_k <= len(order)
    if has_top_k:
        kept = [token for token in kept if values[token] >= values[order[top_k - 1]]]
    total = math.fsum(probs[token] for token in kept) if has_top_k or len(kept) < len(order) else 1.0
    reached: list[int] = []
    for token in kept:
        if reached and top_p < 1 and math.fsum(probs[earlier] for earlier in reached) >= top_p * total:
            break
        reached.append(token)
    return values[reached[-1]] if has_top_k or len(reached) < len(order) else -math.inf


def slow_top_branches(
    logits: torch.Tensor, num_children: int, temperatures: torch.Tensor | None, noise: Noise | None, support: Support | None
) -> tuple[list[list[int]], list[list[float]]]:
    """Every token ranked, in Python's float64 but for the scores; noise is numpy's."""
    all_tokens, all_probs = [], []
    for row, values in enumerate(logits.float().numpy()):
        scores = values / np.float32(1 if temperatures is None else temperatures[row])
        shifted = scores.astype(np.float64) - scores.max()
        weights = np.exp(shifted)
        probs = (weights / math.fsum(weights)).tolist()
        ranks = values.copy()
        if noise is not None and noise.scales[row] > 0:
            seed, position = noise.seeds[row].cpu().numpy(), noise.positions[row].cpu().numpy()
            ranks = scores + np.float32(noise.scales[row].cpu()) * gumbel_noise(seed, position, np.arange(len(values)))
        floor = -math.inf
        if support is not None:
            top_k, top_p, min_p = (float(bound[row]) for bound in support)
            floor = slow_floor(values.tolist(), probs, int(top_k), top_p, min_p)
        outside = values < floor
        ranks[outside] = -math.inf
        best = sorted(range(len(values)), key=lambda token: (-ranks[token], token))[:num_children]
        all_tokens.append(best)
        all_probs.append([0.0 if outside[token] else probs[token] for token in best])
    return all_tokens, all_probs


def check(
    top: Any,
    logits: torch.Tensor,
    num_children: int,
    temperatures: torch.Tensor | None = None,
    noise: Noise | None = None,
    support: Support | None = None,
) -> None:
    before = logits.clone()
    expected_tokens, expected_probs = slow_top_branches(logits.cpu(), num_children, temperatures, noise, support)
    tokens, probs = top(
        logits.to(DEVICE), num_children, None if temperatures is None else temperatures.to(DEVICE), noise, support
    )
    assert tokens.dtype == torch.int64 and probs.dtype == torch.float32
    assert tokens.tolist() == expected_tokens
    torch.testing.assert_close(probs.cpu(), torch.tensor(expected_probs), **TOLERANCE)
    assert torch.equal(logits, before)


SHAPES = [(1, 1, 1), (6, 5, 3), (6, 67, 9), (6, 1000, 33), (3, 4099, 8)]
KINDS = [(*shape, torch.float32) for shape in SHAPES] + [(6, 67, 8, torch.bfloat16), (3, 1000, 9, torch.float16)]


@tops
@pytest.mark.parametrize("has_support", [False, True], ids=["all-tokens", "support"])
@pytest.mark.parametrize("has_noise", [False, True], ids=["plain", "noise"])
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "num_children", "dtype"),
    [pytest.param(*kind, id="R{}-V{}-F{}-{}".format(*kind).replace("torch.", "")) for kind in KINDS],
)
def test_branches_are_those_of_a_sort(
    num_rows: int, vocab_size: int, num_children: int, dtype: torch.dtype, has_noise: bool, has_support: bool, top: Any
) -> None:
    if top is top_branches_triton and DEVICE == "cpu":
        num_rows = min(num_rows, 3)  # the interpreter is slow
    torch.manual_seed(vocab_size)
    logits = (3 * torch.randn(num_rows, vocab_size)).to(dtype)
    logits[1::2][torch.rand(logits[1::2].shape) < 0.5] = -math.inf
    logits[:, vocab_size // 2] = 1.0
    temperatures = torch.rand(num_rows) * 2 + 0.1 if num_children % 2 else None
    noise = noise_of(num_rows) if has_noise else None
    support = support_of([BOUNDS[(3 * row + num_children) % len(BOUNDS)] for row in range(num_rows)]) if has_support else None
    check(top, logits, num_children, temperatures, noise, support)


@tops
@pytest.mark.parametrize(("vocab_size", "scale"), [(40, 0.0), (300, 1.0)], ids=["V40-plain", "V300-noise"])
def test_every_bound_masks_as_the_slow_filter_does(vocab_size: int, scale: float, top: Any) -> None:
    """Some bounds keep fewer tokens than are wanted: the masked ones with the lowest ids follow."""
    torch.manual_seed(3)
    logits = 2 * torch.randn(len(BOUNDS), vocab_size)
    check(top, logits, 12, None, noise_of(len(BOUNDS), [scale]), support_of(BOUNDS))


@tops
def test_tokens_that_equal_the_last_kept_one_are_kept(top: Any) -> None:
    logits = torch.tensor([[0.0, 3, 1, 3, 3, 2, 2, 2, -1]] * 4)
    support = support_of([(2, 1.0, 0.0), (4, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.3)])
    check(top, logits, 9, None, None, support)
    check(top, logits, 9, None, noise_of(4, [1.0, 0.5]), support)


@tops
def test_bounds_behind_the_inspected_tokens_are_ignored(top: Any) -> None:
    flat = torch.arange(400, 0, -1).float().expand(3, -1) * 1e-3
    plain = top(flat.to(DEVICE), 20, None, noise_of(3, [1.0]))
    bounded = top(flat.to(DEVICE), 20, None, noise_of(3, [1.0]), support_of([(100, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.7)]))
    assert torch.equal(plain[0], bounded[0]) and torch.equal(plain[1], bounded[1])
    assert plain[0].max() > 100


@tops
def test_rows_of_scale_zero_are_ranked_by_logit(top: Any) -> None:
    torch.manual_seed(8)
    logits = torch.randint(-3, 3, (4, 2000)).bfloat16().to(DEVICE)
    temperatures = torch.rand(4, device=DEVICE) + 0.5
    plain = top(logits, 9, temperatures)
    for scales in ([0.0], [0.0, 1.0]):
        tokens, probs = top(logits, 9, temperatures, noise_of(4, scales))
        assert torch.equal(tokens[::2], plain[0][::2]) and torch.equal(probs[::2], plain[1][::2])


@tops
@pytest.mark.parametrize("bounds", [None, (4, 1.0, 0.0)], ids=["all-tokens", "support"])
def test_rows_of_scale_zero_keep_logits_apart_that_a_temperature_makes_equal(bounds: Any, top: Any) -> None:
    logits = torch.tensor([[1.9 + token * 2.0**-23 for token in range(100)]])
    temperatures = torch.tensor([1.2])
    assert len((logits / temperatures).unique()) < 100
    check(top, logits, 9, temperatures, noise_of(1, [0.0]), support_of([bounds]) if bounds else None)


@tops
@pytest.mark.parametrize("has_support", [False, True], ids=["all-tokens", "support"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "all-masked"], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_without_a_distribution_gets_nan_and_spares_its_neighbours(value: Any, has_support: bool, top: Any) -> None:
    torch.manual_seed(2)
    logits = torch.randn(3, 1500, device=DEVICE)
    support = support_of([(3, 0.8, 0.1)] * 3) if has_support else None
    expected = top(logits, 9, None, noise_of(3, [1.0]), support)
    if value == "all-masked":
        logits[1] = -math.inf
    else:
        logits[1, 900] = value
    tokens, probs = top(logits, 9, None, noise_of(3, [1.0]), support)
    assert probs[1].isnan().all()
    assert len(set(tokens[1].tolist())) == 9 and int(tokens[1].min()) >= 0 and int(tokens[1].max()) < 1500
    if value == "all-masked":
        assert tokens[1].tolist() == list(range(9))
    if value == math.inf:
        assert tokens[1, 0] == 900
    for row in (0, 2):
        assert torch.equal(tokens[row], expected[0][row])
        assert torch.equal(probs[row], expected[1][row])


@tops
def test_strided_rows_and_strided_numbers_are_read(top: Any) -> None:
    torch.manual_seed(4)
    backing = torch.full((6, 2 * 151), math.nan)
    backing[::2, ::2] = torch.randn(3, 151)
    noise, support = noise_of(6), support_of(BOUNDS[:6])
    every_second = Noise(*(values[::2] for values in noise)), Support(*(values[::2] for values in support))
    check_strided = backing[::2, ::2]
    tokens, probs = top(check_strided.to(DEVICE), 5, None, *every_second)
    expected = slow_top_branches(check_strided, 5, None, *every_second)
    assert tokens.tolist() == expected[0]
    torch.testing.assert_close(probs.cpu(), torch.tensor(expected[1]), **TOLERANCE)


def test_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, temperatures = torch.randn(11, 3072, device=DEVICE), torch.rand(11, device=DEVICE) + 0.5
    arguments = (8, temperatures, noise_of(11), support_of((BOUNDS * 2)[:11]))
    whole = top_branches_reference(logits, *arguments)
    monkeypatch.setitem(top_branches_reference.__globals__, "_MOST_SCORES", 4 * 3072 + 1)
    in_parts = top_branches_reference(logits, *arguments)
    assert torch.equal(in_parts[0], whole[0])
    torch.testing.assert_close(in_parts[1], whole[1])


@tops
def test_no_rows_give_no_tokens(top: Any) -> None:
    support = Support(*(values[:0] for values in support_of(BOUNDS[:1])))
    tokens, probs = top(torch.zeros(0, 12, device=DEVICE), 3, None, noise_of(0), support)
    assert tokens.shape == probs.shape == (0, 3)


def test_first_branches_follow_softmax() -> None:
    """So do those of a full scale; of none they are always the same."""
    num_rows = 20_000
    logits = torch.tensor([2.0, 1.5, 1, 0.5, 0, 0, -1, -2]).expand(num_rows, -1).to(DEVICE)
    seeds = torch.arange(num_rows, device=DEVICE)
    noise = Noise(seeds, torch.full_like(seeds, 3), torch.ones(num_rows, device=DEVICE))
    temperatures = torch.full((num_rows,), 1.5, device=DEVICE)
    counts = torch.bincount(top_branches(logits, 2, temperatures, noise)[0][:, 0].cpu(), minlength=8)
    expected = num_rows * (logits[0] / 1.5).double().softmax(0).cpu()
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3, counts  # 7 degrees of freedom: 1/1000


@pytest.mark.parametrize(
    ("noise", "support"),
    [
        pytest.param(noise_of(4), None, id="noise-of-other-rows"),
        pytest.param(noise_of(3)._replace(seeds=torch.zeros(3)), None, id="seeds-of-float32"),
        pytest.param(None, support_of(BOUNDS[:2]), id="support-of-other-rows"),
    ],
)
def test_wrong_arguments_are_refused(noise: Noise | None, support: Support | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        top_branches(torch.zeros(3, 4, device=DEVICE), 2, None, noise, support)


def random_rows(random: np.random.Generator, num_rows: int, vocab_size: int) -> np.ndarray:
    """Logits of any size and order, equal ones, masked ones by -inf and by the lowest number."""
    logits = random.normal(size=(num_rows, vocab_size)) * 10.0 ** random.integers(-3, 7)
    if random.random() < 0.3:
        logits = np.round(logits)
    if random.random() < 0.2:
        logits.sort(axis=1)
    logits = logits.astype(np.float32)
    if random.random() < 0.5:
        masked = random.random(logits.shape) < random.choice([0.1, 0.9, 0.999])
        logits[masked] = random.choice([-np.inf, np.finfo(np.float32).min])
    if random.random() < 0.1:
        logits[random.random(logits.shape) < 0.01] = np.inf
    return logits


def all_scores(
    logits: np.ndarray, seeds: np.ndarray, positions: np.ndarray, scales: np.ndarray, temperatures: Any, floors: Any
) -> np.ndarray:
    """float32 [rows, vocab] of all tokens, by the noise of all; -inf for those that come last."""
    with np.errstate(over="ignore"):  # a mask of the lowest number may become -inf
        scores = logits if temperatures is None else logits / temperatures[:, None]
        scores = scores + scales[:, None] * gumbel_noise(seeds[:, None], positions[:, None], np.arange(logits.shape[1]))
    scores[(logits == -np.inf) | (False if floors is None else logits < floors[:, None])] = -np.inf
    return scores


def check_ranking(logits: np.ndarray, count: int, seeds: np.ndarray, positions: np.ndarray, scales: np.ndarray, *of_rows: Any):
    """The tokens of a sort, or others whose scores are the same but for the last digits of float32."""
    found, _ = ranking.ranked_tokens(logits, count, (seeds, positions, scales), *of_rows)
    scores = all_scores(logits, seeds, positions, scales, *of_rows)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    assert all(len({*tokens}) == count for tokens in found.tolist())
    best, ours = np.take_along_axis(scores, expected, 1), np.take_along_axis(scores, found, 1)
    error = 2 * ranking.score_errors(best.astype(np.float64), scales[:, None])
    assert ((best == ours) | (np.abs(best - ours) < error)).all()
    is_last = best == -np.inf
    assert (found[is_last] == expected[is_last]).all()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the difference of infinities
def test_the_search_finds_what_a_sort_of_all_scores_finds(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(12):
        num_rows, vocab_size = int(random.integers(1, 6)), int(random.choice([1, 2, 255, 256, 257, 3000, 9001]))
        count = min(vocab_size, int(random.choice([1, 2, 8, 33, 256, 300])))
        logits = random_rows(random, num_rows, vocab_size)
        seeds, positions = random.integers(-(1 << 63), (1 << 63) - 1, (2, num_rows))
        scales, temperatures, floors = np.ones(num_rows, np.float32), None, None
        if random.random() < 0.7:
            scales = (10 ** random.uniform(-4, 2, num_rows)).astype(np.float32)
        if random.random() < 0.7:
            temperatures = (10 ** random.uniform(-2, 1, num_rows)).astype(np.float32)
        if random.random() < 0.5:
            floors = random.choice([-np.inf, 0.0, 2.0], num_rows).astype(np.float32)
        check_ranking(logits, count, seeds, positions, scales, temperatures, floors)
        of_rows = torch.from_numpy(logits), torch.from_numpy(seeds), torch.from_numpy(positions)
        assert torch.equal(sample_with_noise(*of_rows), sample_with_noise_reference(*of_rows))


@pytest.mark.parametrize("num_threads", [1, 2, 3, 16])
@pytest.mark.parametrize("is_strided", [False, True], ids=["contiguous", "strided"])
def test_threads_do_not_change_what_is_found(num_threads: int, is_strided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    logits, seeds, scales = random_rows(random, 7, 3000), np.arange(7), np.ones(7, np.float32)
    expected = ranking.ranked_tokens(logits, 5, (seeds, seeds, scales))
    monkeypatch.setattr(ranking, "_SCORES_OF_A_THREAD", 1)
    if is_strided:
        logits = np.concatenate([logits, logits], axis=1)[:, :3000]
    found = ranking.ranked_tokens(logits, 5, (seeds, seeds, scales), num_threads=num_threads)
    assert found[0].tolist() == expected[0].tolist() and found[1].tolist() == expected[1].tolist()


@pytest.mark.parametrize(("sd", "count"), [(1, 1), (4, 64)])
def test_a_large_vocabulary_is_searched_exactly(sd: int, count: int) -> None:
    random = np.random.default_rng(sd)
    logits = (sd * random.normal(size=(3, 151_936))).astype(np.float32)
    seeds, positions = random.integers(-(1 << 63), (1 << 63) - 1, 3), np.arange(3)
    check_ranking(logits, count, seeds, positions, np.ones(3, np.float32), None, None)
    of_rows = torch.from_numpy(logits), torch.from_numpy(seeds), torch.from_numpy(positions)
    assert torch.equal(sample_with_noise(*of_rows), sample_with_noise_reference(*of_rows))


def test_tokens_too_close_for_the_search_are_compared_exactly() -> None:
    """Many tokens of each row differ in the last digits of their sums alone, or not at all: the lowest best one is drawn."""
    tokens, seeds = np.arange(100, 1800, 30), np.arange(40)
    digits = np.random.default_rng(0).integers(-1, 2, (40, len(tokens))) * np.spacing(np.float32(30))
    noise = gumbel_noise(seeds[:, None], seeds[:, None], np.arange(2000))
    logits = np.full((40, 2000), -5.0, np.float32)
    logits[:, tokens] = np.float32(30) - noise[:, tokens] + digits
    of_rows = torch.from_numpy(logits), torch.from_numpy(seeds), torch.from_numpy(seeds)
    expected = (logits + noise).argmax(1)
    assert len(set(expected.tolist())) > 3
    assert sample_with_noise(*of_rows).tolist() == expected.tolist()
