"""A tiny language model, what it should say by exact enumeration, and what a sampler makes of it.

The exact side (`next_token_probs`, `exact_joint`) is plain Python and shares nothing with vLLM. The sampled
side (`sample_texts`) goes through a model runner's sampler step by step: see `Stepper`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
import torch
from scipy import stats

VOCAB = 8
JOINT = 3
"""How many tokens of each row are compared."""
MAX_CHAIN = 4
PROMPT: tuple[int, ...] = (5, 1, 5, 2)


@dataclass(frozen=True, slots=True)
class SamplingRule:
    """What a request asks of the sampler; the defaults change nothing."""

    temperature: float = 1.0
    top_k: int = VOCAB
    top_p: float = 1.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    min_p: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    @property
    def penalises(self) -> bool:
        return (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class TokenModel:
    """Next-token logits that depend on the last two tokens: `logits[second last, last, next]`, float32."""

    logits: np.ndarray
    draft_logits: np.ndarray
    """What a draft model would say in their place."""

    @property
    def drafts(self) -> np.ndarray:
        """The drafter's guess after the last two tokens: often the likely token, sometimes an unlikely one."""
        return self.draft_logits.argmax(axis=-1)

    @classmethod
    def random(cls, seed: int) -> TokenModel:
        generator = np.random.default_rng(seed)
        logits = generator.normal(0.0, 1.2, (VOCAB, VOCAB, VOCAB)).astype(np.float32)
        draft_logits = (logits + generator.normal(0.0, 1.2, logits.shape)).astype(np.float32)
        return cls(logits, draft_logits)


def next_token_probs(logits: Sequence[float], rule: SamplingRule, output: Sequence[int]) -> list[float]:
    """The distribution of the next token after PROMPT and `output`, number by number, in float64."""
    scores = [float(value) for value in logits]
    for token, bias in rule.bias:
        scores[token] += bias
    for token in range(VOCAB):
        if token in PROMPT or token in output:
            scores[token] *= 1 / rule.repetition if scores[token] > 0 else rule.repetition
        scores[token] -= rule.frequency * list(output).count(token)
        scores[token] -= rule.presence if token in output else 0.0
    if rule.temperature == 0:
        return [float(token == scores.index(max(scores))) for token in range(VOCAB)]
    weights = [math.exp(score / rule.temperature) for score in scores]
    likely = [token for token in range(VOCAB) if weights[token] >= rule.min_p * max(weights)]
    by_weight = sorted(likely, key=lambda token: -weights[token])
    kept: list[int] = []
    mass_of_top_k = sum(weights[token] for token in by_weight[: rule.top_k])
    for token in by_weight[: rule.top_k]:
        if sum(weights[earlier] for earlier in kept) / mass_of_top_k >= rule.top_p:
            break
        kept.append(token)
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(VOCAB)]


def exact_joint(model: TokenModel, rule: SamplingRule) -> np.ndarray:
    """Probability of every sequence of JOINT tokens after PROMPT, shape [VOCAB] * JOINT."""
    joint = np.zeros((VOCAB,) * JOINT)
    for tokens in product(range(VOCAB), repeat=JOINT):
        probability = 1.0
        for position, token in enumerate(tokens):
            text = PROMPT + tokens[:position]
            probs = next_token_probs(model.logits[text[-2], text[-1]], rule, tokens[:position])
            probability *= probs[token]
        joint[tokens] = probability
    return joint


Lengths = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From the last two tokens of each row [rows, 2]: how many tokens are scheduled, and how many are not -1."""


def fixed(length: int) -> Lengths:
    return lambda last: (np.full(len(last), length), np.full(len(last), length))


def cut(last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ragged chains of 0 to MAX_CHAIN tokens, by what the text ends with."""
    length = (3 * last[:, 0] + last[:, 1]) % (MAX_CHAIN + 1)
    return length, length


def padded(last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """MAX_CHAIN scheduled tokens, of which the first 0 to 3 are real."""
    return np.full(len(last), MAX_CHAIN), (last[:, 0] + last[:, 1]) % MAX_CHAIN


def padding_only(last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the scheduler sends for a request that nobody drafted for."""
    return np.full(len(last), MAX_CHAIN), np.zeros(len(last), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of one batch that share a rule and a way of drafting."""

    name: str
    rule: SamplingRule
    lengths: Lengths


class Rows:
    """The state of a running batch: each row's case, place at the start, and text (two tokens of prompt, then the output)."""

    def __init__(self, case: np.ndarray) -> None:
        self.case = case
        self.place = np.arange(len(case))
        self.lengths = np.zeros(len(case), dtype=np.int64)
        self._text = np.zeros((len(case), 2 + JOINT + MAX_CHAIN), dtype=np.int64)
        self._text[:, :2] = PROMPT[-2:]

    def last_two(self) -> np.ndarray:
        rows = np.arange(len(self.case))
        return np.stack([self._text[rows, self.lengths], self._text[rows, self.lengths + 1]], axis=1)

    def outputs(self) -> list[list[int]]:
        texts = self._text[:, 2:].tolist()
        return [text[:length] for text, length in zip(texts, self.lengths.tolist(), strict=True)]

    def extend(self, sampled: np.ndarray) -> None:
        """Appends to each row what is not -1 in `sampled` [rows, tokens]: so vLLM parses that array."""
        for column in sampled.T:
            rows = np.flatnonzero(column >= 0)
            self._text[rows, 2 + self.lengths[rows]] = column[rows]
            self.lengths[rows] += 1

    def take_finished(self) -> tuple[np.ndarray, np.ndarray]:
        """Removes the rows with JOINT tokens or more; returns their places and first JOINT tokens."""
        finished = self.lengths >= JOINT
        result = self.place[finished], self._text[finished, 2 : 2 + JOINT]
        self.case, self.place, self.lengths, self._text = (
            self.case[~finished],
            self.place[~finished],
            self.lengths[~finished],
            self._text[~finished],
        )
        return result


class Stepper(Protocol):
    """One model runner's sampling."""

    def start(self, cases: Sequence[Case], rows: Rows) -> None:
        """A new batch, of which nothing is sampled yet."""

    def step(self, model: TokenModel, cases: Sequence[Case], rows: Rows) -> None:
        """One target forward and its sampling for every row, as the model runner does it; extends `rows`."""


def sample_texts(
    model: TokenModel, cases: Sequence[Case], samples: int, stepper: Stepper, batch: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """Case [rows] and first JOINT tokens [rows, JOINT] of `samples` rows for every case.

    The cases are interleaved, so that neighbouring rows of a batch have different parameters and chains.
    """
    order = np.tile(np.arange(len(cases)), samples)
    texts = np.empty((len(order), JOINT), dtype=np.int64)
    for start in range(0, len(order), batch):
        rows = Rows(order[start : start + batch])
        stepper.start(cases, rows)
        while len(rows.case):
            stepper.step(model, cases, rows)
            place, tokens = rows.take_finished()
            texts[start + place] = tokens
    return order, texts


def sample_joint(
    model: TokenModel, cases: Sequence[Case], samples: int, stepper: Stepper, batch: int = 4096
) -> list[np.ndarray]:
    """Counts of the first JOINT tokens, one array [VOCAB] * JOINT of total `samples` for every case."""
    counts = np.zeros((len(cases), *(VOCAB,) * JOINT), dtype=np.int64)
    case, texts = sample_texts(model, cases, samples, stepper, batch)
    np.add.at(counts, (case, *texts.T), 1)
    return list(counts)


def p_value(counts: np.ndarray, probs: np.ndarray, smallest_cell: float = 5.0) -> float:
    """Chi-square test of the counts against the exact probabilities; cells of small expectation are pooled.

    Pooling goes by the expectation alone. A count in a cell of probability 0 gives 0. Pearson's statistic,
    because its mean is exact whatever the expectations are, so that many p-values can be combined.
    """
    if counts[probs == 0].any():
        return 0.0
    expected = probs[probs > 0] * counts.sum()
    observed = counts[probs > 0]
    order = np.argsort(expected)
    expected, observed = expected[order], observed[order]
    num_small = int(np.searchsorted(expected, smallest_cell))
    while num_small and expected[:num_small].sum() < smallest_cell:
        num_small += 1
    expected = np.append(expected[num_small:], expected[:num_small].sum())
    observed = np.append(observed[num_small:], observed[:num_small].sum())
    keep = expected > 0
    expected, observed = expected[keep], observed[keep]
    if len(expected) < 2:
        raise ValueError("fewer than two cells are left: more samples are needed")
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, len(expected) - 1))


def scheduled_lengths(cases: Sequence[Case], case: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For rows of these cases: how many tokens are scheduled, and how many are not -1."""
    scheduled, real = np.zeros((2, len(last)), dtype=np.int64)
    for index, one in enumerate(cases):
        mine = case == index
        scheduled[mine], real[mine] = one.lengths(last[mine])
    return scheduled, real


def draft_and_score(
    model: TokenModel, last: np.ndarray, scheduled: np.ndarray, real: np.ndarray
) -> tuple[np.ndarray, torch.Tensor]:
    """Chains [rows, MAX_CHAIN] and the target's logits at all positions, flat [sum(scheduled + 1), VOCAB]."""
    num_rows = len(last)
    chain = np.full((num_rows, MAX_CHAIN), -1)
    scores = np.empty((num_rows, MAX_CHAIN + 1, VOCAB), dtype=np.float32)
    before, latest = last[:, 0], last[:, 1]
    for position in range(MAX_CHAIN + 1):
        scores[:, position] = model.logits[before, latest]
        if position < MAX_CHAIN:
            chain[:, position] = np.where(position < real, model.drafts[before, latest], -1)
            # vLLM feeds token 0 where a padding stands.
            before, latest = latest, np.maximum(chain[:, position], 0)
    return chain, torch.from_numpy(scores[np.arange(MAX_CHAIN + 1) <= scheduled[:, None]])
