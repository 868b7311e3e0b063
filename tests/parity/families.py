"""What V1's samplers are asked for in the tests of losslessness, and when what they say is the exact distribution."""

from __future__ import annotations

from collections.abc import Sequence

from tests.parity.distribution import (
    Case,
    SamplingRule,
    Stepper,
    TokenModel,
    cut,
    exact_joint,
    fixed,
    p_value,
    padded,
    padding_only,
    sample_joint,
)

SAMPLES = 100_000
FEWER_SAMPLES = 10_000

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
OURS: tuple[tuple[Case, ...], ...] = (
    *FAMILIES,
    # What vLLM's rejection sampler does not do.
    (
        Case("T1.5-min_p-chain4", SamplingRule(temperature=1.5, min_p=0.25), fixed(4)),
        Case("T1-bias-cut", SamplingRule(bias=((2, 1.5), (5, -2.0), (6, 0.7))), cut),
        Case("T1-chain1-beside-bias", SamplingRule(), fixed(1)),
        Case("T0.5-min_p-bias-top_p-padded", SamplingRule(0.5, top_p=0.9, min_p=0.05, bias=((1, 1.0),)), padded),
    ),
)


def p_values(seed: int, families: Sequence[Sequence[Case]], stepper: Stepper) -> dict[str, float]:
    """One p-value for every case, each on SAMPLES rows; on FEWER_SAMPLES where Python handles each row by itself."""
    model = TokenModel.random(seed)
    results = {}
    for family in families:
        is_slow = any(case.rule.penalises or case.rule.bias for case in family)
        samples = FEWER_SAMPLES if is_slow else SAMPLES
        counts = sample_joint(model, family, samples, stepper)
        for case, count in zip(family, counts, strict=True):
            assert count.sum() == samples
            results[case.name] = p_value(count, exact_joint(model, case.rule))
    return results


def assert_plausible(results: dict[str, float]) -> None:
    """Bonferroni: a right sampler passes with probability 0.999 or more, whatever the dependence between the cases."""
    worst = min(results, key=results.__getitem__)
    assert len(results) * results[worst] >= 1e-3, f"{worst}: p = {results[worst]:.3g}"
