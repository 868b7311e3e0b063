"""Mends of the functions that stand in for the rejection sampler's Triton kernels on vLLM's CPU platform.

Each mend is built around the original, keeps its parameters, and is installed where vLLM takes the function from when it
registers its kernels, and in the registered kernels when that has already happened.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_Function = Callable[..., None]

_IMPLEMENTATIONS = "vllm.utils.cpu_triton_utils"
_KERNELS = "vllm.v1.sample.rejection_sampler"


def expand_in_place(original: _Function) -> _Function:
    """`output[i] = input_val[row of i]` in the dtype of `output`, every value kept exactly.

    The original hands int64 copies of both tensors to C++. What is written is lost, so temperature, top_k and top_p of drafted
    rows stay uninitialised; and a float would have been cut to an integer on the way.
    """

    @functools.wraps(original)
    def mended(output: Any, input_val: Any, cu_num_tokens: Any, replace_from: int, replace_to: int, *_: Any, **__: Any) -> None:
        values = input_val.masked_fill(input_val == replace_from, replace_to)
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        expanded = values.repeat_interleave(counts)
        output[: expanded.shape[0]] = expanded

    return mended


def reject_padding(original: _Function) -> _Function:
    """A draft token below 0 is always rejected, as in the Triton kernel.

    The original reads the target probability at index -1, the last one of the row before (for the first row: memory before the
    tensor), and accepts the padding with that probability.
    """

    def change(arguments: dict[str, Any]) -> None:
        padded = arguments["draft_token_ids"] < 0
        if bool(padded.any()):
            arguments["draft_token_ids"] = arguments["draft_token_ids"].clamp(min=0)
            arguments["draft_probs"] = _without_rows(arguments["draft_probs"], padded)
            arguments["uniform_probs"] = arguments["uniform_probs"].masked_fill(padded, float("inf"))

    return _with_changed(original, change)


def recover_padding_from_target(original: _Function) -> _Function:
    """The token that replaces a rejected padding comes from the target's distribution alone.

    Without draft probabilities the original does that. With them, it subtracts those of a token that was never drafted.
    """

    def change(arguments: dict[str, Any]) -> None:
        arguments["draft_probs"] = _without_rows(arguments["draft_probs"], arguments["draft_token_ids"] < 0)

    return _with_changed(original, change)


def _with_changed(original: _Function, change: Callable[[dict[str, Any]], None]) -> _Function:
    """``original``, called with arguments that ``change`` has replaced by name."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def mended(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        change(call.arguments)
        original(*call.args, **call.kwargs)

    return mended


def _without_rows(draft_probs: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    if draft_probs is None or not bool(rows.any()):
        return draft_probs
    return draft_probs.masked_fill(rows.unsqueeze(-1), 0.0)


class KernelMend:
    """Replaces `implementation`, vLLM's CPU function for the Triton kernel `kernel`, by `build(original)`."""

    def __init__(self, implementation: str, kernel: str, build: Callable[[_Function], _Function]) -> None:
        self._implementation = implementation
        self._kernel = kernel
        self._build = build
        self._original: _Function | None = None
        self._mended: _Function | None = None

    def apply(self) -> None:
        if not self.is_applied():
            self._original = self._current()
            self._mended = self._build(self._original)
            self._bind(self._mended)

    def revert(self) -> None:
        if self.is_applied() and self._original is not None:
            self._bind(self._original)

    def is_applied(self) -> bool:
        return self._mended is not None and self._current() is self._mended

    def _current(self) -> _Function:
        function: _Function = getattr(importlib.import_module(_IMPLEMENTATIONS), self._implementation)
        return function

    def _bind(self, function: _Function) -> None:
        setattr(importlib.import_module(_IMPLEMENTATIONS), self._implementation, function)
        kernels = sys.modules.get(_KERNELS)
        dispatcher = sys.modules.get("vllm.triton_utils.dispatcher")
        if kernels is None or dispatcher is None:
            return
        if isinstance(getattr(kernels, self._kernel), dispatcher.KernelOverride):
            dispatcher.register_kernels({f"{_KERNELS}.{self._kernel}": function})
