"""Shorter ways to the same kernels, for draft models so small that a forward is mostly dispatch.

Each was found with a profiler on a two-layer model on one core; the results stay the same to rounding.
"""

from __future__ import annotations

import torch
from vllm import ir
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

__all__ = ["register_cpu_norms", "shorten_dispatch"]

_PROVIDER = "double_cpu"


def register_cpu_norms(vllm_config: VllmConfig) -> None:
    """Let vLLM's RMS norms use its own C++ kernels, which its CPU build has but does not choose."""
    if not all(hasattr(torch.ops._C, name) for name in ("rms_norm", "fused_add_rms_norm")):
        return
    if _PROVIDER not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(_PROVIDER, supports_args=_takes_rms_norm)(_rms_norm)
        ir.ops.fused_add_rms_norm.register_impl(_PROVIDER, supports_args=_takes_fused_add_rms_norm, inplace=True)(
            _fused_add_rms_norm
        )
    priority = vllm_config.kernel_config.ir_op_priority
    for name in ("rms_norm", "fused_add_rms_norm"):
        setattr(priority, name, [_PROVIDER, *getattr(priority, name)])


def shorten_dispatch(vllm_config: VllmConfig) -> None:
    """Call attention directly; the custom op around it only matters to torch.compile."""
    for layer in get_layers_from_vllm_config(vllm_config, Attention).values():
        layer.use_direct_call = True


def _takes_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype and x.is_contiguous()


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> torch.Tensor:
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, epsilon)
    return output


def _takes_fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _takes_rms_norm(x, weight, epsilon, variance_size) and x_residual.is_contiguous()


def _fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
