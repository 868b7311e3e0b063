"""Operations of the draft engine that plain model code does not have: torch and, on a GPU, triton only.

Each op has a file with its contract, dispatch and reference, and a file triton_* with its kernels. A CPU also needs numba.
"""

from double_kernels.fork_pages import fork_pages
from double_kernels.noise import Noise, draw_chances, gumbel_noise
from double_kernels.sample_with_noise import sample_with_noise
from double_kernels.support import Support
from double_kernels.top_branches import top_branches

__all__ = [
    "Noise",
    "Support",
    "draw_chances",
    "fork_pages",
    "gumbel_noise",
    "sample_with_noise",
    "top_branches",
]
