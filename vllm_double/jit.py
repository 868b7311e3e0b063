"""How functions on arrays are compiled by numba: for one signature, before the first request, kept for later processes."""

import functools
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core.caching import FunctionCache

__all__ = ["as_int", "compiled", "machine_code", "part", "view_part"]

Function = TypeVar("Function", bound=Callable[..., Any])


def part(function: Function) -> Function:
    """A function that is compiled into its callers."""
    return cast(Function, numba.njit(function))


def view_part(function: Function) -> Function:
    """A part of `machine_code`. It allocates nothing, so it need not count references: each view of an array would cost two."""
    return cast(Function, numba.njit(function, _nrt=False))


@part
def as_int(number: Any) -> int:
    """As int64: numba makes a float of an int64 and a uint64 together."""
    return np.int64(number)  # type: ignore[return-value]


class _Cache(FunctionCache):
    """numba's cache looks at size and date of one file; our functions are compiled into those of other files, too."""

    def _index_key(self, *arguments: Any) -> tuple[Any, ...]:
        return (*super()._index_key(*arguments), _sources())


@functools.cache
def _sources() -> str:
    """Digest of all files in folders with compiled functions: their records and constants are compiled in, too."""
    kernels = importlib.util.find_spec("double_kernels")
    homes = [Path(__file__).parent, *map(Path, kernels.submodule_search_locations or () if kernels else ())]
    texts = {file: file.read_bytes() for home in homes for file in sorted(home.rglob("*.py"))}
    folders = {file.parent for file, text in texts.items() if b"vllm_double.jit" in text or b"import numba" in text}
    return hashlib.sha256(b"".join(text for file, text in texts.items() if file.parent in folders)).hexdigest()


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


def machine_code(function: Function, *examples: Any, releases_gil: bool = False, counts_references: bool = True) -> Function:
    """The machine code of a function for arguments of the examples' types, past the dispatcher, whose look at the types of all
    arguments takes longer than a short call. Nothing checks the arguments: they must have these types.

    A function that does not allocate arrays, and whose parts return no views of them, need not count references: that halves
    the time that it takes to hand arrays over.

    The code keeps the GIL, unless it is for a thread beside the round: another that takes it may keep it for 5 ms.
    """
    signature = tuple(numba.typeof(example) for example in examples)
    (only,) = compiled(function, signature, nogil=releases_gil, _nrt=counts_references).overloads.values()
    return cast(Function, only.entry_point)
