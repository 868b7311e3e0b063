"""How functions on arrays are compiled by numba: for one signature, before the first request, kept for later processes."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import cgutils, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

__all__ = ["bare", "compiled", "of_arrays", "of_numbers", "part", "pointer"]

Function = TypeVar("Function", bound=Callable[..., Any])


def part(function: Function) -> Function:
    """A function that is compiled into its callers."""
    return cast(Function, numba.njit(function))


def bare(function: Function) -> Function:
    """A part without reference counts: its callers' caller keeps the arrays. It makes no arrays, and returns none."""
    return cast(Function, numba.njit(function, _nrt=False))


@intrinsic
def pointer(_typing: Any, address: Any) -> Any:
    """The address as a pointer, for `numba.carray`."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


class _Cache(FunctionCache):
    """numba's cache looks at size and date of one file; our functions are compiled into those of other files, too."""

    def _index_key(self, *arguments: Any) -> tuple[Any, ...]:
        return (*super()._index_key(*arguments), _sources())


@functools.cache
def _sources() -> str:
    """Digest of the files with compiled functions, and of the draft's records."""
    files = [file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(text for text in files if b"numba" in text or b"vllm_double.jit" in text)).hexdigest()


def compiled(function: Callable[..., Any], signature: str | tuple[Any, ...], **options: bool) -> Any:
    """Compile for one signature only, so that no request ever compiles; from numba's cache where that works.

    numba caches beside this file or, where that is read-only, in the user's cache directory. A missing, full
    or damaged cache costs the compile time, nothing else.
    """
    try:
        dispatcher = numba.njit(function, **options)
        dispatcher._cache = _Cache(function)
        dispatcher.compile(signature)
    except Exception:  # whatever unpickling a damaged file raises; a compiler error is raised again below
        dispatcher = numba.njit(function, **options)
        dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher


def of_arrays(function: Function, *examples: Any) -> Function:
    """The machine code of a `bare` function for arguments of the examples' types: arrays, named tuples of arrays, numbers.

    Past the dispatcher, which looks at the types of all arguments. Nothing checks them: they must be the examples'.
    """
    (only,) = compiled(function, tuple(map(numba.typeof, examples)), nogil=True, _nrt=False).overloads.values()
    return cast(Function, only.entry_point)


def of_numbers(function: Callable[..., Any], num_arguments: int, returns: str = "UniTuple(int64, 2)") -> Callable[..., Any]:
    """The machine code of a function of int64, past the dispatcher, which looks at the types of all arguments: half of a short
    call. Not for arrays, which nothing would check."""
    signature = f"{returns}({', '.join(['int64'] * num_arguments)})"
    (only,) = compiled(function, signature).overloads.values()
    return cast(Callable[..., Any], only.entry_point)
