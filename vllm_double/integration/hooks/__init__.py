"""Everything of vLLM that is replaced or relied upon, in one table that is checked before it is used.

Importing this package imports neither vLLM nor torch.
"""

from vllm_double.integration.hooks.entries import ENTRIES
from vllm_double.integration.hooks.mends import MENDS, apply, mend_cpu_sampler, revert
from vllm_double.integration.hooks.registry import SUPPORTED, Entry, Names, UnsupportedVllm, check, require

__all__ = [
    "ENTRIES",
    "MENDS",
    "SUPPORTED",
    "Entry",
    "Names",
    "UnsupportedVllm",
    "apply",
    "check",
    "mend_cpu_sampler",
    "require",
    "revert",
]
