"""vLLM's file of the noise, without the rest of vLLM, which disables triton where it finds no device."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import triton
import triton.language as tl


def _load() -> Any:
    """The module; None if vLLM is not installed."""
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        return None
    path = Path(vllm.origin).parent / "v1/worker/gpu/sample/gumbel.py"
    spec = importlib.util.spec_from_file_location("vllm_gumbel_alone", path)
    assert spec is not None and spec.loader is not None
    module, utils = importlib.util.module_from_spec(spec), ModuleType("vllm.triton_utils")
    utils.__dict__.update(tl=tl, triton=triton)
    with patch.dict(sys.modules, {"vllm": ModuleType("vllm"), "vllm.triton_utils": utils}):
        spec.loader.exec_module(module)
    return module


gumbel = _load()


@triton.jit
def noise_kernel(seed_ptr: Any, position_ptr: Any, token_ptr: Any, noise_ptr: Any, N: tl.constexpr) -> None:
    """The noise of N tokens, as `gumbel_noised_argmax` computes it."""
    place = tl.arange(0, N)
    uniform = gumbel.murmur3_uniform32(tl.load(seed_ptr), tl.load(position_ptr), tl.load(token_ptr + place))
    tl.store(noise_ptr + place, -tl.log(-gumbel._log1p_neg_stable(uniform)))
