"""Operations of the draft engine that plain model code does not have: torch (and, on a GPU, triton) only."""

from double_kernels.fork_pages import fork_pages
from double_kernels.top_branches import top_branches

__all__ = ["fork_pages", "top_branches"]
