"""Everything of vLLM that is replaced or relied upon, in one table that is checked before it is used.

Importing this package imports neither vLLM nor torch.
"""

from vllm_double.integration.hooks.entries import ENTRIES, MENDS
from vllm_double.integration.hooks.gate import mend_cpu_sampler, require
from vllm_double.integration.hooks.registry import (
    SUPPORTED,
    Entry,
    Mismatch,
    Patch,
    Signature,
    UnsupportedVllm,
    apply,
    check,
    is_applied,
    revert,
)

__all__ = [
    "ENTRIES",
    "MENDS",
    "SUPPORTED",
    "Entry",
    "Mismatch",
    "Patch",
    "Signature",
    "UnsupportedVllm",
    "apply",
    "check",
    "is_applied",
    "mend_cpu_sampler",
    "require",
    "revert",
]
