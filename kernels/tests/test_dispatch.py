"""Which implementation an op takes, and that a machine without triton can do without."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from double_kernels import (
    fork_pages,
    sample_with_noise,
    top_branches,
    triton_fork_pages,
    triton_noise,
    triton_top_branches,
)

CALLS = {
    "fork_pages": lambda: fork_pages([torch.zeros(3, 4)], [(0, 1, 2)], page_size=4, slot_dim=1),
    "sample_with_noise": lambda: sample_with_noise(torch.zeros(2, 9), torch.arange(2), torch.arange(2)),
    "top_branches": lambda: top_branches(torch.zeros(2, 9), 3),
}
KERNELS = {
    "fork_pages": triton_fork_pages,
    "sample_with_noise": triton_noise,
    "top_branches": triton_top_branches,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("is_cuda", [False, True])
def test_the_device_chooses_the_implementation(name: str, is_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def launcher(*args: Any, **kwargs: Any) -> str:
        launched.append((args, kwargs))
        return "kernel"

    monkeypatch.setattr(KERNELS[name], f"{name}_triton", launcher)
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda, raising=False)
    result = CALLS[name]()
    assert len(launched) == is_cuda
    assert (result == "kernel") if is_cuda and name != "fork_pages" else (result != "kernel")


def test_a_cpu_needs_no_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from double_kernels import Noise, Support, fork_pages, sample_with_noise, top_branches
assert "numba" not in sys.modules and "llvmlite" not in sys.modules
cache = torch.arange(12.0).view(3, 4)
fork_pages([cache], [(0, 1, 2)], page_size=4, slot_dim=1)
assert cache[1].tolist() == [0, 1, 6, 7]
assert top_branches(torch.tensor([[0.0, 2.0, 1.0]]), 2)[0].tolist() == [[1, 2]]
seed = torch.tensor([5])
sampled = sample_with_noise(torch.zeros(1, 9), seed, seed)
noise, support = Noise(seed, seed, torch.ones(1)), Support(seed.int(), torch.ones(1), torch.zeros(1))
assert torch.equal(top_branches(torch.zeros(1, 9), 1, None, noise, support)[0][0], sampled)
others = {name.partition(".")[0] for name in sys.modules} & {"vllm", "vllm_double", "ray"}
assert not others, others
"""
    path = [entry for entry in sys.path if entry]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], check=True)
