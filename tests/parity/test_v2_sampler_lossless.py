"""Sampling with drafted chains on vLLM's V2 runner must give the target's own distribution.

As test_sampler_lossless.py, with V2's sampler and rejection sampler, whose Triton kernels are interpreted here, and with
chains that our speculator wrote to the device, where they have to be those that were scheduled. The interpreter is slow, so
there are few rows: no case is further from the exact distribution than one in a thousand is, and each fault is found, with
p < 1e-9, on as many rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

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
    scheduled_lengths,
)

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
GREEDY = Case("greedy-cut", SamplingRule(temperature=0), cut)


class V2Sampler:
    """The states and samplers of a V2 runner, and our speculator, for one batch after another."""

    def __init__(self) -> None:
        self._seeds = np.random.default_rng(SEED)

    def start(self, cases: Sequence[Case], rows: Rows) -> None:
        """The prompts' prefill is done but for its last token; nothing is sampled yet."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.worker.gpu.sample.sampler import Sampler
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
        from vllm.v1.worker.gpu.states import RequestState

        from vllm_double.integration.v2 import DoubleSpeculator

        num_rows, device = len(rows.case), torch.device("cpu")
        length = len(PROMPT) + JOINT + MAX_CHAIN + 1
        self._states = RequestState(num_rows, length, num_rows * (MAX_CHAIN + 1), MAX_CHAIN, VOCAB, device)
        self._sampler = Sampler(SimpleNamespace(reasoning_config=None), num_rows, VOCAB, device, self._states)
        config = SimpleNamespace(
            num_speculative_tokens=MAX_CHAIN, enable_adaptive_verification=False, rejection_sample_method="standard"
        )
        self._rejection_sampler = RejectionSampler(self._sampler, config, device)
        self._speculator = object.__new__(DoubleSpeculator)
        self._speculator._num_tokens = MAX_CHAIN
        for place, case in enumerate(rows.case):
            self._states.add_request(str(place), len(PROMPT), list(PROMPT), len(PROMPT) - 1, JOINT)
            params = SamplingParams(temperature=cases[case].rule.temperature, seed=int(self._seeds.integers(1 << 62)))
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
    from vllm.v1.worker.gpu.sample import gumbel
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        for module, name in (
            (gumbel, "_temperature_kernel"),
            (gumbel, "_gumbel_sample_kernel"),
            (rejection_sampler_utils, "_compute_local_logits_stats_kernel"),
            (rejection_sampler_utils, "_resample_kernel"),
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


def test_joint_distribution_of_three_tokens_leaves_the_exact_one(model: TokenModel) -> None:
    values = {}
    for case, count in zip(SAMPLED, sample_joint(model, SAMPLED, ROWS, SEED, stepper=V2Sampler()), strict=True):
        exact = exact_joint(model, case.rule)
        values |= {case.name: p_value(count, exact), f"{case.name}, two tokens": p_value_of_two(count, exact)}
    worst = min(values, key=values.__getitem__)
    assert len(values) * values[worst] >= 1e-3, f"{worst}: p = {values[worst]:.3g}"


def test_greedy_rows_beside_sampled_ones_leave_the_argmax(model: TokenModel) -> None:
    rows = 20
    greedy, _ = sample_joint(model, (GREEDY, SAMPLED[-1]), rows, SEED, stepper=V2Sampler())
    assert np.array_equal(greedy, exact_joint(model, GREEDY.rule) * rows)


def p_value_of_two(counts: np.ndarray, probs: np.ndarray) -> float:
    """Of the first two tokens, of which the second is the first that a draft was verified for: with few rows the sharper."""
    return p_value(counts.sum(axis=2), probs.sum(axis=2))


@contextmanager
def draw_without_masking_the_draft() -> Iterator[None]:
    """The token after a rejection is drawn from p, not from p without the rejected token."""
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

    def forget_the_draft(arguments: list[Any], options: dict[str, Any]) -> None:
        drafts = 14  # the place of draft_sampled_ptr
        arguments[drafts] = torch.full_like(arguments[drafts], -1)

    kernel = rejection_sampler_utils._resample_kernel
    with patch.object(rejection_sampler_utils, "_resample_kernel", Relaunched(kernel, forget_the_draft)):
        yield


@contextmanager
def accept_too_easily() -> Iterator[None]:
    """A draft is accepted with 1.5 times its probability."""
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

    def raise_logits(arguments: list[Any], options: dict[str, Any]) -> None:
        logits = 5  # the place of target_logits_ptr; their sums were taken before
        arguments[logits] = arguments[logits] + np.log(1.5)

    kernel = rejection_sampler_utils._rejection_kernel
    with patch.object(rejection_sampler_utils, "_rejection_kernel", Relaunched(kernel, raise_logits)):
        yield


FAULTS = (draw_without_masking_the_draft, accept_too_easily)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_the_comparison_overlooks_a_fault(model: TokenModel, fault: Callable[[], AbstractContextManager[None]]) -> None:
    case = Case("T1-chain4", SamplingRule(), fixed(4))
    with fault():
        (count,) = sample_joint(model, (case,), ROWS, SEED, stepper=V2Sampler())
    assert p_value_of_two(count, exact_joint(model, case.rule)) < 1e-9


def test_what_the_speculator_does_not_write_is_overlooked(model: TokenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_double.integration.v2 import DoubleSpeculator

    monkeypatch.setattr(DoubleSpeculator, "_write_drafts", lambda self, states, scheduled: None)
    with pytest.raises(AssertionError, match="not what was scheduled"):
        sample_joint(model, SAMPLED, 4, SEED, stepper=V2Sampler())
