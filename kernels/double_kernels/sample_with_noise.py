"""One token per row by the Gumbel-max trick, with noise that is a function of seed, position and token."""

from __future__ import annotations

import torch

__all__ = ["sample_with_noise", "sample_with_noise_reference"]


def sample_with_noise(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The token with the highest logit + gumbel_noise(seed, position, token) of every row, int64 [rows].

    logits: float32 [rows, vocab], not changed, any strides. Temperature and masks are applied already; -inf is a token
        of probability zero.
    seeds, positions: int64 [rows] on the same device.

    Equals vLLM's `gumbel_sample` of processed logits (vllm/v1/worker/gpu/sample/gumbel.py), of the same device, bit for
    bit. So do its corner cases: of equal sums the lowest token is taken, and of a row without a finite logit token 0.
    Of a row with NaN some token is taken.

    Raises ValueError for a wrong shape or dtype.

    On a GPU the kernel of triton_noise does it, without a host synchronisation. On a CPU it is a search that looks
    closer at few tokens only, with the same result as the reference.
    """
    _check(logits, seeds, positions)
    if logits.is_cuda:
        from double_kernels.triton_noise import sample_with_noise_triton  # here: a CPU needs no triton

        return sample_with_noise_triton(logits, seeds, positions)
    from double_kernels.noisy_tokens import noisy_tokens  # here: a GPU needs none

    if logits.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64)
    best = noisy_tokens(logits.detach().numpy(), 1, seeds.numpy(), positions.numpy(), num_threads=torch.get_num_threads())
    tokens: torch.Tensor = torch.from_numpy(best[:, 0])
    return tokens


def sample_with_noise_reference(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`sample_with_noise` by the noise of all tokens, on any device; its arguments are not checked."""
    from double_kernels.noisy_tokens import noisy_tokens_reference

    best = noisy_tokens_reference(logits.detach().cpu().numpy(), 1, seeds.cpu().numpy(), positions.cpu().numpy())
    tokens: torch.Tensor = torch.from_numpy(best[:, 0].copy()).to(logits.device)
    return tokens


def _check(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.shape[1] == 0:
        raise ValueError(f"logits must be float32 [rows, vocab], not {logits.dtype} {tuple(logits.shape)}")
    for name, values in (("seeds", seeds), ("positions", positions)):
        if values.dtype != torch.int64 or values.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be int64 [{logits.shape[0]}], not {values.dtype} {tuple(values.shape)}")
