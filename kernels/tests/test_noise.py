"""The noise is vLLM's, bit for bit, wherever it is computed."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from double_kernels import draw_chances, gumbel_noise, sample_with_noise
from double_kernels.sample_with_noise import sample_with_noise_reference
from double_kernels.triton_noise import gumbel_noise_of, sample_with_noise_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = [0, 1, -1, 7, -(1 << 63), (1 << 63) - 1, 1 << 32, (1 << 32) + 7, 123_456_789_012_345, -987_654_321_098]
POSITIONS = [0, 1, 17, 4096, (1 << 31) - 1, 1 << 31, (1 << 31) + 5, 1 << 32, (1 << 40) + 3]
SAMPLERS = [
    pytest.param(sample_with_noise, id="dispatched"),
    pytest.param(sample_with_noise_reference, id="reference"),
    pytest.param(sample_with_noise_triton, id="kernel"),
]
pytestmark = pytest.mark.usefixtures("poisoned_memory")

_spec = importlib.util.spec_from_file_location("vllm_gumbel", Path(__file__).with_name("vllm_gumbel.py"))
assert _spec is not None and _spec.loader is not None
vllm_gumbel = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(vllm_gumbel)


@pytest.fixture(scope="module")
def vllm() -> Any:
    if vllm_gumbel.gumbel is None:
        pytest.skip("vLLM is not installed")
    return vllm_gumbel.gumbel


@triton.jit
def our_noise(seed_ptr: Any, position_ptr: Any, token_ptr: Any, noise_ptr: Any, N: tl.constexpr) -> None:
    place = tl.arange(0, N)
    noise = gumbel_noise_of(tl.load(seed_ptr), tl.load(position_ptr), tl.load(token_ptr + place))
    tl.store(noise_ptr + place, noise)


def of_kernel(kernel: Any, seed: int, position: int, tokens: torch.Tensor) -> torch.Tensor:
    noise = torch.empty(len(tokens), device=DEVICE)
    seeds, positions = torch.tensor([seed], device=DEVICE), torch.tensor([position], device=DEVICE)
    kernel[(1,)](seeds, positions, tokens.to(DEVICE), noise, N=len(tokens))
    return noise.cpu()


def cases() -> list[tuple[int, int, torch.Tensor]]:
    """Seeds and positions of every kind, each with 1,024 tokens below 2 ** 18."""
    random = np.random.default_rng(0)
    chosen = [(seed, POSITIONS[place % len(POSITIONS)]) for place, seed in enumerate(SEEDS)]
    chosen += [(SEEDS[place % len(SEEDS)], position) for place, position in enumerate(POSITIONS)]
    chosen += [(int(random.integers(-(1 << 63), (1 << 63) - 1)), int(random.integers(1 << 33))) for _ in range(40)]
    return [(seed, position, torch.from_numpy(random.integers(0, 1 << 18, 1024))) for seed, position in chosen]


@pytest.mark.usefixtures("vllm")
def test_the_noise_is_vllms_bit_for_bit() -> None:
    """On a GPU the kernels' noise is compared: its logarithm rounds otherwise than numpy's."""
    for seed, position, tokens in cases():
        expected = of_kernel(vllm_gumbel.noise_kernel, seed, position, tokens)
        found = of_kernel(our_noise, seed, position, tokens)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), (seed, position)
        reference = torch.from_numpy(gumbel_noise(np.array(seed), np.array(position), tokens.numpy()))
        if DEVICE == "cpu":
            assert torch.equal(reference.view(torch.int32), expected.view(torch.int32)), (seed, position)
        torch.testing.assert_close(reference, expected, rtol=1e-5, atol=2e-6)


def test_the_kernels_noise_is_the_references() -> None:
    for seed, position, tokens in cases()[:20]:
        reference = torch.from_numpy(gumbel_noise(np.array(seed), np.array(position), tokens.numpy()))
        tolerance = {"rtol": 0.0, "atol": 0.0} if DEVICE == "cpu" else {"rtol": 1e-5, "atol": 2e-6}
        torch.testing.assert_close(of_kernel(our_noise, seed, position, tokens), reference, **tolerance)


def test_seeds_positions_and_tokens_are_broadcast() -> None:
    seeds, positions, tokens = np.array(SEEDS)[:, None, None], np.array(POSITIONS)[:, None], np.arange(50, dtype=np.int32)
    noise = gumbel_noise(seeds, positions, tokens)
    assert noise.shape == (len(SEEDS), len(POSITIONS), 50) and noise.dtype == np.float32
    for row, seed in enumerate(SEEDS):
        one = gumbel_noise(np.array(seed), np.array(POSITIONS[3]), np.array(49))
        assert one.shape == () and one == noise[row, 3, 49]
    assert gumbel_noise(np.array(3), np.array([1, 2]), np.empty((0, 1), dtype=np.int64)).shape == (0, 2)


def test_the_noise_is_finite_and_has_gumbels_moments() -> None:
    noise = gumbel_noise(np.arange(100)[:, None], np.array(5), np.arange(20_000)).astype(np.float64)
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772157) < 5 * math.sqrt(1.645 / noise.size)
    assert abs(noise.var() / 1.6449341 - 1) < 0.01
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.004
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.004


def rows(num_rows: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, seeds and positions; of the rows some are flat, some have masked tokens."""
    generator = torch.Generator().manual_seed(num_rows * vocab_size)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * torch.arange(num_rows)[:, None]
    logits[1::3][torch.rand(logits[1::3].shape, generator=generator) < 0.7] = -math.inf
    seeds = torch.randint(-(1 << 62), 1 << 62, (num_rows,), generator=generator)
    positions = torch.randint(0, 1 << 33, (num_rows,), generator=generator)
    return logits.to(DEVICE), seeds.to(DEVICE), positions.to(DEVICE)


SHAPES = [(1, 1), (3, 5), (5, 257), (6, 1024), (4, 1025), (3, 9001)]
shapes = pytest.mark.parametrize(
    ("num_rows", "vocab_size"), [pytest.param(*shape, id="R{}-V{}".format(*shape)) for shape in SHAPES]
)


@pytest.mark.parametrize("sample", SAMPLERS)
@shapes
def test_sampled_tokens_are_vllms(num_rows: int, vocab_size: int, sample: Any, vllm: Any) -> None:
    if DEVICE == "cuda" and sample is sample_with_noise_reference:
        pytest.skip("the logarithm of a GPU rounds otherwise")
    logits, seeds, positions = rows(num_rows, vocab_size)
    if num_rows > 3:
        logits[3] = -math.inf
        logits[2, vocab_size // 2 :] = math.inf
    states = torch.arange(num_rows, device=DEVICE)
    expected = vllm.gumbel_sample(logits, states, torch.ones(num_rows, device=DEVICE), seeds, positions, False, False)
    found = sample(logits, seeds, positions)
    assert found.dtype == torch.int64 and torch.equal(found, expected)


@pytest.mark.parametrize("sample", SAMPLERS)
@shapes
def test_the_sampled_token_has_the_highest_sum(num_rows: int, vocab_size: int, sample: Any) -> None:
    logits, seeds, positions = rows(num_rows, vocab_size)
    tokens = sample(logits, seeds, positions)
    for row in range(num_rows):
        noise = gumbel_noise(np.array(int(seeds[row])), np.array(int(positions[row])), np.arange(vocab_size))
        scores = (logits[row].cpu().numpy() + noise).tolist()
        assert int(tokens[row]) == scores.index(max(scores))


@pytest.mark.parametrize("sample", SAMPLERS)
def test_the_lowest_of_equal_sums_is_sampled(sample: Any) -> None:
    """Beside 2 ** 30 the noise is lost in float32: all sums are equal, and more than the search has room for."""
    logits = torch.full((3, 5000), -math.inf, device=DEVICE)
    logits[0, 7:] = float(1 << 30)
    logits[1, [9, 4000]] = math.inf
    seeds = torch.arange(3, device=DEVICE)
    assert sample(logits, seeds, seeds).tolist() == [7, 9, 0]


@pytest.mark.parametrize("sample", SAMPLERS)
def test_strided_logits_are_read_without_what_lies_between(sample: Any) -> None:
    logits, seeds, positions = rows(4, 301)
    expected = sample(logits, seeds, positions)
    for step in (1, 2):
        backing = torch.full((8, 301 * step + 9), math.nan, device=DEVICE)
        view = backing[::2, : 301 * step : step]
        view.copy_(logits)
        wide = torch.stack([seeds, positions], dim=1)
        assert torch.equal(sample(view, wide[:, 0], wide[:, 1]), expected)
        assert torch.equal(view, logits)


@pytest.mark.parametrize("sample", SAMPLERS)
def test_a_row_with_nan_gets_a_token_and_spares_its_neighbours(sample: Any) -> None:
    logits, seeds, positions = rows(3, 2000)
    expected = sample(logits, seeds, positions)
    logits[1, 1700] = math.nan
    tokens = sample(logits, seeds, positions)
    assert 0 <= int(tokens[1]) < 2000
    assert tokens[[0, 2]].tolist() == expected[[0, 2]].tolist()


@pytest.mark.parametrize("sample", SAMPLERS)
def test_no_rows_give_no_tokens(sample: Any) -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert sample(torch.zeros(0, 12, device=DEVICE), none, none).shape == (0,)


@pytest.mark.parametrize("varied", ["seeds", "positions"])
def test_samples_follow_softmax(varied: str) -> None:
    num_rows = 30_000
    logits = torch.tensor([3.0, 2, 2, 1.5, 1, 0.5, 0, 0, -1, -2, -math.inf, 2.5], device=DEVICE)
    numbers = {name: torch.full((num_rows,), 11, device=DEVICE) for name in ("seeds", "positions")}
    numbers[varied] = torch.arange(num_rows, device=DEVICE)
    tokens = sample_with_noise(logits.expand(num_rows, -1), **numbers)
    expected = num_rows * logits.double().softmax(0).cpu()
    counts = torch.bincount(tokens.cpu(), minlength=len(logits))
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    assert chi_square < 29.6, counts  # 10 degrees of freedom: more has a probability of 1/1000


@pytest.mark.parametrize(
    ("logits", "seeds", "positions"),
    [
        pytest.param(torch.zeros(3), torch.arange(3), torch.arange(3), id="one-dimension"),
        pytest.param(torch.zeros(3, 4).bfloat16(), torch.arange(3), torch.arange(3), id="bfloat16"),
        pytest.param(torch.zeros(3, 0), torch.arange(3), torch.arange(3), id="no-tokens"),
        pytest.param(torch.zeros(3, 4), torch.arange(4), torch.arange(3), id="seeds-of-other-rows"),
        pytest.param(torch.zeros(3, 4), torch.arange(3), torch.arange(3).int(), id="positions-of-int32"),
    ],
)
def test_wrong_arguments_are_refused(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be"):
        sample_with_noise(logits, seeds, positions)


def test_the_chance_to_be_drawn_is_that_of_the_largest_of_all_scores() -> None:
    rng = np.random.default_rng(5)
    seeds, positions = rng.integers(-(2**62), 2**62, 7), rng.integers(0, 2**31, 7)
    tokens, lengths = rng.integers(0, 50_000, (7, 5)).astype(np.int32), np.array([5, 0, 3, 5, 1, 2, 5], np.int32)
    probs = rng.random((7, 5)).astype(np.float32)
    chances = probs.copy()
    draw_chances(seeds, positions, tokens, lengths, chances)
    noise = gumbel_noise(seeds[:, None], positions[:, None] + np.arange(5), tokens).astype(np.float64)
    expected = np.exp((probs.astype(np.float64) - 1) / probs * np.exp(-noise))
    counts = np.arange(5) < lengths[:, None]
    np.testing.assert_allclose(chances[counts], expected[counts], rtol=1e-4, atol=1e-7)
    assert (chances[~counts] == probs[~counts]).all()


@pytest.mark.parametrize("prob", [0.05, 0.5, 0.9])
def test_the_mean_chance_over_the_noise_is_the_probability(prob: float) -> None:
    seeds = np.arange(20_000)
    chances = np.full((20_000, 1), prob, np.float32)
    draw_chances(seeds, np.full(20_000, 9), np.full((20_000, 1), 7, np.int32), np.ones(20_000, np.int32), chances)
    assert abs(float(chances.mean()) - prob) < 0.01
