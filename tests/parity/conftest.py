from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")  # vLLM cannot register its kernels twice
def cpu_sampler() -> Iterator[None]:
    """vLLM's CPU sampler as a worker has it, with our mends."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("vllm")
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    from vllm_double.integration import hooks as patches

    if not current_platform.is_cpu() or HAS_TRITON:
        pytest.skip("the CPU build's sampler is tested here")
    current_platform.import_kernels()
    mends = [entry.function for entry in patches.MENDS]
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
