"""Sampling with drafted chains must give the target's own distribution.

The joint distribution of a row's first three tokens, drawn through vLLM's rejection sampler with our mends,
is compared with exact enumeration. A seed gives one p-value for each of `NUM_CASES` cases. What is asserted:

* per seed, that the whole family is plausible: Bonferroni, `NUM_CASES * min(p) >= 1e-3`, which a right
  sampler passes with probability 0.999 or more, whatever the dependence between the cases;
* over all seeds and cases, whose random streams are disjoint, that Fisher's combination is at least 1e-3, so
  that a bias too small for one case does not pass because it is small everywhere.

That the test can fail is shown with faults: each is rejected at p < 1e-9 for every seed, on as many samples.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from scipy import stats

from tests.parity.distribution import (
    Case,
    SamplingRule,
    TokenModel,
    cut,
    exact_joint,
    fixed,
    p_value,
    padded,
    padding_only,
    sample_joint,
)
from vllm_double import patches

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

SAMPLES = 100_000
SEEDS = range(5)

# A family is one batch: vLLM takes other paths when some row of the batch has top_p, top_k or penalties.
FAMILIES: tuple[tuple[Case, ...], ...] = (
    (
        Case("T0.5-chain4", SamplingRule(temperature=0.5), fixed(4)),
        Case("T1-chain1", SamplingRule(), fixed(1)),
        Case("T1.5-cut", SamplingRule(temperature=1.5), cut),
        Case("T1-chain0", SamplingRule(), fixed(0)),
        Case("T1-padded", SamplingRule(), padded),
        Case("T1.5-padding-only", SamplingRule(temperature=1.5), padding_only),
    ),
    (
        Case("T0.5-top_p-chain4", SamplingRule(temperature=0.5, top_p=0.8), fixed(4)),
        Case("T1-top_k-top_p-cut", SamplingRule(top_k=5, top_p=0.9), cut),
        Case("T1.5-top_p-padded", SamplingRule(temperature=1.5, top_p=0.6), padded),
    ),
    (
        Case("T1.5-top_k-chain4", SamplingRule(temperature=1.5, top_k=3), fixed(4)),
        Case("T1-chain1-beside-top_k", SamplingRule(), fixed(1)),
    ),
    (
        Case("T1-repetition-chain1", SamplingRule(repetition=1.5), fixed(1)),
        Case("T1.5-frequency-padded", SamplingRule(temperature=1.5, frequency=0.7), padded),
        Case(
            "T0.5-presence-and-everything-cut",
            SamplingRule(0.5, top_k=6, top_p=0.95, repetition=1.2, presence=0.8, frequency=0.3),
            cut,
        ),
    ),
)
NUM_CASES = sum(len(family) for family in FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def mended_sampler() -> Iterator[None]:
    """vLLM's CPU sampler as a worker has it, with our mends."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if not current_platform.is_cpu() or HAS_TRITON:
        pytest.skip("the CPU build's sampler is tested here")
    current_platform.import_kernels()
    mends = [entry.name for entry in patches.MENDS]
    assert list(patches.mend_cpu_sampler({})) == mends
    current_platform.register_triton_kernel_overrides()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # The collector would walk all of torch's objects again and again: penalties take many small lists.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(num_threads)


@cache
def p_values(seed: int) -> dict[str, float]:
    """One p-value for every case, each on SAMPLES rows."""
    model = TokenModel.random(seed)
    results = {}
    for number, family in enumerate(FAMILIES):
        counts = sample_joint(model, family, SAMPLES, seed * len(FAMILIES) + number)
        for case, count in zip(family, counts, strict=True):
            assert count.sum() == SAMPLES
            results[case.name] = p_value(count, exact_joint(model, case.rule))
    return results


@pytest.mark.parametrize("seed", SEEDS)
def test_joint_distribution_of_three_tokens_leaves_the_exact_one(seed: int) -> None:
    results = p_values(seed)
    worst = min(results, key=results.__getitem__)
    assert len(results) == NUM_CASES
    assert NUM_CASES * results[worst] >= 1e-3, f"{worst}: p = {results[worst]:.3g}"


def test_a_small_bias_is_spread_over_cases_and_seeds() -> None:
    everything = [value for seed in SEEDS for value in p_values(seed).values()]
    assert stats.combine_pvalues(everything, method="fisher").pvalue >= 1e-3


def test_greedy_rows_beside_sampled_ones_leave_the_argmax() -> None:
    model = TokenModel.random(0)
    greedy = SamplingRule(temperature=0)
    cases = (
        Case("greedy-chain4", greedy, fixed(4)),
        Case("T1.5-cut", SamplingRule(temperature=1.5), cut),
        Case("greedy-padded", greedy, padded),
        Case("greedy-cut", greedy, cut),
    )
    counts = sample_joint(model, cases, 20_000, seed=0)
    for case, count in zip(cases, counts, strict=True):
        exact = exact_joint(model, case.rule)
        if case.rule is greedy:
            assert np.array_equal(count, exact * 20_000), case.name
        else:
            assert p_value(count, exact) >= 1e-3


@contextmanager
def draw_without_masking_the_draft() -> Iterator[None]:
    """The token after a rejection is drawn from p, not from p without the rejected token."""
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.sample_recovered_tokens

    def without_mask(longest: int, lengths: Any, ends: Any, drafts: Any, *others: Any) -> Any:
        return original(longest, lengths, ends, torch.full_like(drafts, -1), *others)

    with patch.object(rejection_sampler, "sample_recovered_tokens", without_mask):
        yield


@contextmanager
def heat_drafted_rows() -> Iterator[None]:
    """Drafted positions are sampled at a temperature that is a fifth too high."""
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.expand_batch_to_tokens

    def hotter(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **options) * 1.2

    with patch.object(rejection_sampler, "expand_batch_to_tokens", hotter):
        yield


@contextmanager
def accept_padding() -> Iterator[None]:
    """vLLM's own function, without our mend."""
    mend = [entry for entry in patches.MENDS if entry.name == "cpu-reject-padding"]
    patches.revert(mend)
    try:
        yield
    finally:
        patches.mend_cpu_sampler({})


@contextmanager
def draw_the_bonus_one_position_early() -> Iterator[None]:
    """The bonus token is drawn from the logits that judged the last drafted token."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    original = RejectionSampler.forward

    def off_by_one(self: Any, metadata: Any, *others: Any) -> Any:
        drafted = torch.tensor(metadata.num_draft_tokens) > 0
        metadata.bonus_logits_indices = metadata.bonus_logits_indices - drafted.int()
        return original(self, metadata, *others)

    with patch.object(RejectionSampler, "forward", off_by_one):
        yield


FAULTS: tuple[tuple[Callable[[], AbstractContextManager[None]], Case], ...] = (
    (draw_without_masking_the_draft, Case("T1-chain4", SamplingRule(), fixed(4))),
    (heat_drafted_rows, Case("T0.5-chain4", SamplingRule(temperature=0.5), fixed(4))),
    (accept_padding, Case("T1-padded", SamplingRule(), padded)),
    (draw_the_bonus_one_position_early, Case("T1-chain1", SamplingRule(), fixed(1))),
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("fault", "case"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_the_comparison_overlooks_a_fault(fault: Callable[[], AbstractContextManager[None]], case: Case, seed: int) -> None:
    model = TokenModel.random(seed)
    with fault():
        (count,) = sample_joint(model, (case,), SAMPLES, seed)
    assert p_value(count, exact_joint(model, case.rule)) < 1e-9
