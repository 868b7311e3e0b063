"""The mends of vLLM's CPU sampler: the functions that are replaced, for every speculative method and on a CPU only."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping

from vllm_double.integration.hooks.cpu_sampler import (
    KernelMend,
    expand_in_place,
    recover_padding_from_target,
    reject_padding,
)
from vllm_double.integration.hooks.registry import Entry, UnsupportedVllm, check, installed_version, platform, refusal

__all__ = ["MENDS", "apply", "mend_cpu_sampler", "revert"]

_logger = logging.getLogger(__name__)

_SWITCH = "VLLM_DOUBLE_MEND_CPU_SAMPLER"
_KERNELS = "vllm.utils.cpu_triton_utils"

# fmt: off
MENDS: tuple[Entry, ...] = (
    Entry(f"{_KERNELS}:_expand_kernel_impl", "output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=None",
        "expands per-request sampling parameters to drafted tokens in the output tensor itself",
        "the original writes into a copy: temperature, top_k and top_p of drafted rows are whatever the memory held",
        "vLLM's function writes into the tensor that it is given", "e3fc0cf56c7ff05c",
        KernelMend("_expand_kernel_impl", "expand_kernel", expand_in_place)),
    Entry(f"{_KERNELS}:_rejection_random_sample_kernel_impl",
        "output_token_ids, cu_num_draft_tokens, draft_token_ids, draft_probs, target_probs, bonus_token_ids, "
        "recovered_token_ids, "
        "uniform_probs, is_greedy, max_spec_len, vocab_size, ...", "rejects draft tokens below 0",
        "the original accepts a padding of -1 with the probability that lies before the row in memory",
        "vLLM's native kernel rejects draft tokens below 0", "75c6c9a885b12d1d",
        KernelMend("_rejection_random_sample_kernel_impl", "rejection_random_sample_kernel", reject_padding)),
    Entry(f"{_KERNELS}:_sample_recovered_tokens_kernel_impl",
        "output_token_ids, cu_num_draft_tokens, draft_token_ids, draft_probs, target_probs, inv_q, vocab_size, ...",
        "draws the token in place of a padding from the target's distribution",
        "the original subtracts the draft's probabilities although nothing was drafted there",
        "vLLM's function leaves out the draft's probabilities of a padding", "fa4183af5f709244",
        KernelMend("_sample_recovered_tokens_kernel_impl", "sample_recovered_tokens_kernel", recover_padding_from_target)),
)
# fmt: on


def apply(entries: Iterable[Entry], vllm_version: str) -> tuple[str, ...]:
    """Put the patches of ``entries`` in place, all or none; returns the functions that are replaced now.

    Raises UnsupportedVllm, with nothing applied, if a function to replace is not the one that was read.
    """
    entries = tuple(entries)
    if mismatches := check(entries):
        raise refusal(vllm_version, mismatches)
    patches = [entry.patch for entry in entries if entry.patch is not None]
    for patch in patches:
        patch.apply()
    return tuple(entry.function for entry in entries)


def revert(entries: Iterable[Entry]) -> None:
    """Put the original functions back."""
    for entry in entries:
        if entry.patch is not None:
            entry.patch.revert()


def mend_cpu_sampler(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Mend the sampling of drafted rows on a CPU; returns the functions that are replaced now.

    To be called before or after vLLM registered its kernels. A sampler that is not the one that was read is left alone, with a
    warning. `VLLM_DOUBLE_MEND_CPU_SAMPLER=0` switches the mends off.
    """
    if environ.get(_SWITCH, "1") == "0" or platform() != "cpu":
        return ()
    try:
        return apply(MENDS, installed_version())
    except UnsupportedVllm as error:
        _logger.warning("vLLM's CPU sampler is left as it is: %s", error)
        return ()
