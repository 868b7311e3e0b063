"""vLLM's CPU sampler with our mends, for tests: the fixture `cpu_kernels` and the context `without`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from vllm_double.integration import hooks as patches

BY_NAME = {entry.target: entry for entry in patches.ENTRIES if isinstance(entry, patches.Entry)}


def is_applied(entry: patches.Entry) -> bool:
    """Whether the entry's replacement is in place in this process."""
    return entry.patch is not None and entry.patch.is_applied()


@pytest.fixture
def cpu_kernels() -> Iterator[Any]:
    """vLLM's CPU functions with kernels registered and mends applied; they are applied again afterwards."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if not current_platform.is_cpu() or HAS_TRITON:
        pytest.skip("the CPU build's sampler is tested here")
    current_platform.import_kernels()
    # vLLM looks into every attribute of every module, and stumbles over llvmlite's, which other tests import. What vLLM imports
    # meanwhile stays: it registers operators, which works once.
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite")}
    try:
        current_platform.register_triton_kernel_overrides()
    finally:
        sys.modules.update(hidden)
    assert patches.mend_cpu_sampler({})
    yield importlib.import_module("vllm.utils.cpu_triton_utils")
    assert patches.mend_cpu_sampler({})


@contextmanager
def without(name: str) -> Iterator[None]:
    """vLLM as it is without one of the mends."""
    patches.revert([BY_NAME[name]])
    assert not is_applied(BY_NAME[name])
    try:
        yield
    finally:
        patches.mend_cpu_sampler({})
