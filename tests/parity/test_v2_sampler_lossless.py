"""Sampling with drafted chains on vLLM's V2 runner gives the target's own distribution, and V1's texts.

As test_sampler_lossless.py, with V2's sampler and what our speculator puts in place of its verification; Triton kernels are
interpreted here, and chains are those that our speculator wrote to the device, where they have to be those that were scheduled.
The interpreter is slow, so there are few rows: no case is further from the exact distribution than one in a thousand is, and
each fault is found, with p < 1e-9, on as many rows. Noise that is shared with a ratio test is left to the other file: no runner
has a part in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from double_kernels import sample_with_noise

from tests.parity.distribution import (
    JOINT,
    MAX_CHAIN,
    PROMPT,
    VOCAB,
    Case,
    Rows,
    SamplingRule,
    TokenModel,
    cut,
    draft_and_score,
    exact_joint,
    fixed,
    p_value,
    padded,
    sample_joint,
    sample_texts,
    scheduled_lengths,
)
from tests.parity.v1_steps import SharedNoise

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: see the Makefile", allow_module_level=True)
torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

ROWS = 250
SEED = 1
SAMPLED = (
    Case("T1-cut", SamplingRule(), cut),
    Case("T0.5-chain4", SamplingRule(temperature=0.5), fixed(4)),
    Case("T1.5-padded", SamplingRule(temperature=1.5), padded),
)
MIN_P = Case("T1.5-min_p-cut", SamplingRule(temperature=1.5, min_p=0.3), cut)
GREEDY = Case("greedy-cut", SamplingRule(temperature=0), cut)


class V2Sampler:
    """The states and samplers of a V2 runner, and our speculator, for one batch after another."""

    def __init__(self) -> None:
        self._new_seeds = np.random.default_rng(SEED)

    def start(self, cases: Sequence[Case], rows: Rows) -> None:
        """The prompts' prefill is done but for its last token; nothing is sampled yet."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.worker.gpu.sample.sampler import Sampler
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
        from vllm.v1.worker.gpu.states import RequestState

        from vllm_double.integration.v2 import DoubleSpeculator, share_noise

        num_rows, device = len(rows.case), torch.device("cpu")
        length = len(PROMPT) + JOINT + MAX_CHAIN + 1
        self._states = RequestState(num_rows, length, num_rows * (MAX_CHAIN + 1), MAX_CHAIN, VOCAB, device)
        self._sampler = Sampler(SimpleNamespace(reasoning_config=None), num_rows, VOCAB, device, self._states)
        config = SimpleNamespace(
            num_speculative_tokens=MAX_CHAIN, enable_adaptive_verification=False, rejection_sample_method="standard"
        )
        self._rejection_sampler = RejectionSampler(self._sampler, config, device)
        share_noise(SimpleNamespace(sampler=self._sampler, rejection_sampler=self._rejection_sampler))
        self._speculator = object.__new__(DoubleSpeculator)
        self._speculator._num_tokens = MAX_CHAIN
        seeds = self._new_seeds.integers(-(1 << 63), 1 << 63, num_rows).tolist()
        for place, case in enumerate(rows.case):
            self._states.add_request(str(place), len(PROMPT), list(PROMPT), len(PROMPT) - 1, JOINT)
            rule = cases[case].rule
            params = SamplingParams(temperature=rule.temperature, min_p=rule.min_p, seed=seeds[place])
            self._sampler.add_request(self._states.req_id_to_index[str(place)], params)
        self._states.apply_staged_writes()
        self._sampler.apply_staged_writes()

    def step(self, model: TokenModel, cases: Sequence[Case], rows: Rows) -> None:
        """As GPUModelRunner prepares its inputs and samples."""
        last = rows.last_two()
        scheduled, real = scheduled_lengths(cases, rows.case, last)
        scheduled[rows.lengths == 0] = 0  # V2 drafts behind a sampled token alone
        chain, logits = draft_and_score(model, last, scheduled, real)
        batch = self._batch(rows, scheduled, chain, last)
        if scheduled.any():
            output = self._rejection_sampler(logits, batch, self._speculator.draft_logits, None)
        else:
            output = self._sampler(logits, batch)
        sampled = output.sampled_token_ids.numpy()
        # Behind what was sampled the memory is whatever it was.
        rows.extend(np.where(np.arange(sampled.shape[1]) < output.num_sampled.numpy()[:, None], sampled, -1))

    def _batch(self, rows: Rows, scheduled: np.ndarray, chain: np.ndarray, last: np.ndarray) -> Any:
        from vllm.v1.worker.gpu.input_batch import combine_sampled_and_draft_tokens, expand_idx_mapping

        states, names = self._states, list(map(str, rows.place))
        drafts = {name: row[:length].tolist() for name, row, length in zip(names, chain, scheduled, strict=True) if length}
        self._speculator._write_drafts(states, drafts)
        index = np.array([states.req_id_to_index[name] for name in names])
        states.last_sampled_tokens[torch.from_numpy(index), 0] = torch.from_numpy(last[:, 1])
        ends = np.concatenate([[0], np.cumsum(scheduled + 1)]).astype(np.int32)
        texts = len(PROMPT) + rows.lengths
        positions = np.concatenate([np.arange(text - 1, text + length) for text, length in zip(texts, scheduled, strict=True)])
        idx_mapping, cu_num_logits = torch.from_numpy(index), torch.from_numpy(ends)
        seq_lens = torch.from_numpy((texts + scheduled).astype(np.int32))
        input_ids = torch.zeros(int(ends[-1]), dtype=torch.int32)
        logits_indices = combine_sampled_and_draft_tokens(
            input_ids, idx_mapping, states.last_sampled_tokens, cu_num_logits, seq_lens, states.prefill_len.gpu,
            states.draft_tokens, cu_num_logits, int(ends[-1]),
        )  # fmt: skip
        # What the forward reads is what was scheduled, but for prompts, whose tokens are not these.
        read = input_ids.numpy()[np.repeat(rows.lengths > 0, scheduled + 1)]
        sent = np.concatenate([last[:, 1:], np.maximum(chain, 0)], axis=1)
        wanted = sent[(np.arange(MAX_CHAIN + 1) <= scheduled[:, None]) & (rows.lengths > 0)[:, None]]
        assert np.array_equal(read, wanted), "what is verified is not what was scheduled"
        expanded, local = expand_idx_mapping(idx_mapping, int(ends[-1]), cu_num_logits, MAX_CHAIN + 1)
        return SimpleNamespace(
            num_reqs=len(names), idx_mapping=idx_mapping, idx_mapping_np=index, expanded_idx_mapping=expanded,
            expanded_local_pos=local, input_ids=input_ids, positions=torch.from_numpy(positions), logits_indices=logits_indices,
            cu_num_logits=cu_num_logits, cu_num_logits_np=ends, seq_lens=seq_lens, seq_lens_cpu_upper_bound=seq_lens,
        )  # fmt: skip


class Relaunched:
    """A Triton kernel whose arguments are changed at each launch."""

    def __init__(self, kernel: Any, change: Callable[[list[Any], dict[str, Any]], None]) -> None:
        self._kernel, self._change = kernel, change

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **options: Any) -> Any:
            changed = list(arguments)
            self._change(changed, options)
            return self._kernel[grid](*changed, **options)

        return launch


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """vLLM's stand-ins for what V2 asks of CUDA; and what makes the interpreter fast enough.

    Blocks are no wider than our vocabulary, or it computes 8,192 tokens for 8. And what it replaces in triton.language for
    each function that a kernel calls, which is most of its time, it replaces once.
    """
    import vllm.v1.worker.cpu.shm  # noqa: F401
    from triton import language
    from triton.runtime import interpreter
    from vllm.v1.worker.gpu.sample import gumbel, min_p

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        for module, name in (
            (gumbel, "_temperature_kernel"),
            (gumbel, "_gumbel_sample_kernel"),
            (min_p, "_min_p_kernel"),
        ):
            narrow = Relaunched(getattr(module, name), lambda arguments, options: options.update(BLOCK_SIZE=VOCAB))
            patched.setattr(module, name, narrow)
        replaced = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
        patched.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        yield
        replaced.restore()
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def model() -> TokenModel:
    return TokenModel.random(SEED)


def test_joint_distribution_of_three_tokens_is_the_exact_one(model: TokenModel) -> None:
    values = {}
    for case, count in zip(SAMPLED, sample_joint(model, SAMPLED, ROWS, V2Sampler()), strict=True):
        exact = exact_joint(model, case.rule)
        values |= {case.name: p_value(count, exact), f"{case.name}, two tokens": p_value_of_two(count, exact)}
    worst = min(values, key=values.__getitem__)
    assert len(values) * values[worst] >= 1e-3, f"{worst}: p = {values[worst]:.3g}"


def test_greedy_rows_beside_sampled_ones_are_the_argmax(model: TokenModel) -> None:
    rows = 20
    greedy, _ = sample_joint(model, (GREEDY, SAMPLED[-1]), rows, V2Sampler())
    assert np.array_equal(greedy, exact_joint(model, GREEDY.rule) * rows)


def p_value_of_two(counts: np.ndarray, probs: np.ndarray) -> float:
    """Of the first two tokens, of which the second is the first that a draft was verified for: with few rows the sharper."""
    return p_value(counts.sum(axis=2), probs.sum(axis=2))


def test_a_text_is_that_without_chains_and_that_of_v1(model: TokenModel) -> None:
    rows, cases = 8, (*SAMPLED, MIN_P)
    _, texts = sample_texts(model, cases, rows, V2Sampler())
    without = [replace(case, lengths=fixed(0)) for case in cases]
    assert np.array_equal(texts, sample_texts(model, without, rows, V2Sampler())[1])
    assert np.array_equal(texts, sample_texts(model, cases, rows, SharedNoise(SEED))[1])


def test_draws_of_both_runners_are_the_same() -> None:
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    rng, rows = np.random.default_rng(0), 100
    logits = torch.from_numpy(rng.normal(scale=2.0, size=(rows, VOCAB)).astype(np.float32))
    logits[torch.from_numpy(rng.random((rows, VOCAB)) < 0.3)] = -torch.inf
    seeds = torch.from_numpy(rng.integers(-(1 << 63), 1 << 63, rows))
    positions = torch.from_numpy(rng.integers(0, 1 << 20, rows))
    drawn = gumbel_sample(
        logits, torch.arange(rows), torch.ones(rows), seeds, positions, apply_temperature=False, is_drafting=False
    )
    assert torch.equal(drawn, sample_with_noise(logits, seeds, positions))
    assert len(drawn.unique()) == VOCAB


@contextmanager
def use_the_noise_of_the_position_before_again() -> Iterator[None]:
    """Verified rows have the noise of the first position: with few rows sharper than only behind draft tokens."""
    from vllm_double.integration import v2

    verify = v2.verify_chains

    def late(*arguments: Any) -> Any:
        changed = list(arguments)
        changed[POS] = torch.full_like(changed[POS], len(PROMPT) - 1)
        return verify(*changed)

    with patch.object(v2, "verify_chains", late):
        yield


@contextmanager
def let_the_draft_choose_between_the_best_two() -> Iterator[None]:
    """A draft token is accepted if it is one of the two best, as the draft ranks it first."""
    with redrawn(choose):
        yield


def choose(draw: Callable[[torch.Tensor], torch.Tensor], processed: torch.Tensor, verified: Sequence[Any]) -> torch.Tensor:
    drawn = draw(processed)
    second = draw(processed.scatter(1, drawn[:, None], -torch.inf))
    drafts = verified[DRAFTS].roll(-1)
    is_drafted = (verified[LOCAL_POS].roll(-1) > 0) & (second == drafts)
    return torch.where(is_drafted, drafts, drawn)


@contextmanager
def draw_before_filters() -> Iterator[None]:
    """The noise decides among all tokens; for one that min_p leaves out the least probable one that it keeps is taken."""
    with redrawn(filter_late):
        yield


def filter_late(draw: Callable[[torch.Tensor], torch.Tensor], processed: torch.Tensor, verified: Sequence[Any]) -> torch.Tensor:
    drawn = draw(verified[LOGITS] / HOT)
    is_kept = processed.gather(1, drawn[:, None]).squeeze(1) > -torch.inf
    return torch.where(is_kept, drawn, processed.masked_fill(processed == -torch.inf, torch.inf).argmin(dim=1))


@contextmanager
def redrawn(change: Callable[..., torch.Tensor]) -> Iterator[None]:
    """The draws of a verification are ``change(draw, processed logits, arguments of the verification)``."""
    from vllm_double.integration import v2

    verify, draw = v2.verify_chains, v2.gumbel_sample

    def verify_changed(*arguments: Any) -> Any:
        def draw_changed(processed: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
            return change(lambda logits: draw(logits, *others, **options), processed, arguments)

        with patch.object(v2, "gumbel_sample", draw_changed):
            return verify(*arguments)

    with patch.object(v2, "verify_chains", verify_changed):
        yield


LOGITS, DRAFTS, POS, LOCAL_POS = 1, 3, 4, 9  # arguments of verify_chains
HOT = 1.5
HOT_CHAIN1 = Case("T1.5-chain1", SamplingRule(temperature=HOT), fixed(1))
FAULTS = (
    (use_the_noise_of_the_position_before_again, HOT_CHAIN1),
    (let_the_draft_choose_between_the_best_two, Case("T1-chain4", SamplingRule(), fixed(4))),
    (draw_before_filters, Case("T1.5-min_p-chain1", SamplingRule(temperature=HOT, min_p=0.3), fixed(1))),
)


@pytest.mark.parametrize(("fault", "case"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_the_comparison_finds_a_fault(model: TokenModel, fault: Callable[[], AbstractContextManager[None]], case: Case) -> None:
    with fault():
        (count,) = sample_joint(model, (case,), ROWS, V2Sampler())
    probs = exact_joint(model, case.rule)
    last_two = p_value(count.sum(axis=0), probs.sum(axis=0))  # V2 verifies no drafts behind the first token
    assert min(p_value_of_two(count, probs), last_two, p_value(count, probs)) < 1e-9


def test_drafts_that_the_speculator_does_not_write_are_noticed(model: TokenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_double.integration.v2 import DoubleSpeculator

    monkeypatch.setattr(DoubleSpeculator, "_write_drafts", lambda self, states, scheduled: None)
    with pytest.raises(AssertionError, match="not what was scheduled"):
        sample_joint(model, SAMPLED, 4, V2Sampler())
