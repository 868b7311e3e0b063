"""On a GPU the kernels run compiled, elsewhere under triton's interpreter.

The interpreter has to be chosen before triton is imported, and then holds for the whole process: these tests have one of their
own in `make test`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "triton was imported before its interpreter was chosen: give kernels/tests a process of its own"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty returns is full of garbage: a kernel that leaves a hole in its results is found."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.numel():
            tensor.flatten().view(torch.uint8).fill_(0x5A)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
