"""How a function of somebody else's is wrapped: once, and so that the original stays what it was for everybody else."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["then", "wrap_once"]

_MARK = "_vllm_double_wrapped"


def wrap_once(owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Decorates what takes the place of ``owner.name``, an attribute of a module, a class or an object.

    The original is its first argument, those of the call follow. An attribute that was wrapped already stays as it is.
    """

    def decorate(function: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        if getattr(original, _MARK, False):
            return

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        setattr(wrapped, _MARK, True)
        is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
        setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)

    return decorate


def then(owner: Any, name: str, follow: Callable[..., None]) -> None:
    """Have calls of ``owner.name`` followed by ``follow`` with the same arguments, even if they fail: half of their work may be
    done.
    """

    @wrap_once(owner, name)
    def followed(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            follow(*args, **kwargs)
