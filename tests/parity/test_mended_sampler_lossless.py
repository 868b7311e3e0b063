"""vLLM's own rejection sampler with our mends, as other speculative methods use it, gives the target's own distribution.

As test_sampler_lossless.py, for fewer models: method double draws otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from scipy import stats

from tests.parity.distribution import Case, SamplingRule, TokenModel, cut, exact_joint, fixed, p_value, padded, sample_joint
from tests.parity.families import FAMILIES, SAMPLES, assert_plausible, p_values
from tests.parity.v1_steps import VllmsRejection
from vllm_double.integration import hooks as patches

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
pytestmark = pytest.mark.usefixtures("cpu_sampler")

SEEDS = range(1)


@cache
def mended_p_values(seed: int) -> dict[str, float]:
    return p_values(seed, FAMILIES, VllmsRejection(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_joint_distribution_of_three_tokens_is_the_exact_one(seed: int) -> None:
    assert len(mended_p_values(seed)) == sum(map(len, FAMILIES))
    assert_plausible(mended_p_values(seed))


def test_no_small_bias_is_spread_over_cases_and_seeds() -> None:
    everything = [value for seed in SEEDS for value in mended_p_values(seed).values()]
    assert stats.combine_pvalues(everything, method="fisher").pvalue >= 1e-3


def test_greedy_rows_beside_sampled_ones_are_the_argmax() -> None:
    model = TokenModel.random(0)
    greedy = SamplingRule(temperature=0)
    cases = (
        Case("greedy-chain4", greedy, fixed(4)),
        Case("T1.5-cut", SamplingRule(temperature=1.5), cut),
        Case("greedy-padded", greedy, padded),
        Case("greedy-cut", greedy, cut),
    )
    counts = sample_joint(model, cases, 20_000, VllmsRejection(0))
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
    mend = [entry for entry in patches.MENDS if "_rejection_random_sample" in entry.target]
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
def test_the_comparison_finds_a_fault(fault: Callable[[], AbstractContextManager[None]], case: Case, seed: int) -> None:
    model = TokenModel.random(seed)
    with fault():
        (count,) = sample_joint(model, (case,), SAMPLES, VllmsRejection(seed))
    assert p_value(count, exact_joint(model, case.rule)) < 1e-9
