"""Operations of the draft engine that plain model code does not have: torch and, on a GPU, triton only.

Each op has a file with what it does, the dispatch and the reference, and a file triton_* with its kernels.
"""

from double_kernels.fork_pages import fork_pages
from double_kernels.insert_guidance import GuidanceBatch, insert_guidance
from double_kernels.top_branches import top_branches

__all__ = ["GuidanceBatch", "fork_pages", "insert_guidance", "top_branches"]
