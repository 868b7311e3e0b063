"""The form of the patch table and what can be done with it: check, apply, revert.

An `Entry` names one function of vLLM. With a `patch` we replace that function, so its whole body has to be
the one that was read; without one we call or wrap it, so only its parameters have to be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from zipfile import Path as ZipPath

from vllm_double.integration.hooks.source import FunctionSource, read_function

SUPPORTED: tuple[str, ...] = ("0.31", "0.32")
"""Minor versions of vLLM that our tests run against, oldest first."""

Platform = Literal["any", "cpu"]


class UnsupportedVllm(RuntimeError):  # noqa: N818 (reads as what it says)
    """The installed vLLM is not one that method "double" can work with; the message is one sentence."""


class Patch(Protocol):
    """A replacement of one function in the running process; doing or undoing it twice is the same as once."""

    def apply(self) -> None: ...

    def revert(self) -> None: ...

    def is_applied(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Signature:
    """What a function must look like: its parameters, and the body's fingerprint where that matters."""

    parameters: str
    fingerprint: str | None = None

    def accepts(self, found: FunctionSource) -> bool:
        return self.parameters == found.parameters and self.fingerprint in (None, found.fingerprint)


@dataclass(frozen=True, slots=True)
class Entry:
    """One function of vLLM that we replace (`patch` is set) or rely upon.

    `target` is "module:qualified.name"; `upstream` maps each minor version that was read to "file:line";
    `expected` lists the accepted forms; `platform` says where the entry matters.
    """

    name: str
    target: str
    what: str
    why: str
    upstream: Mapping[str, str]
    expected: tuple[Signature, ...]
    platform: Platform = "any"
    patch: Patch | None = None

    def __post_init__(self) -> None:
        if self.patch is not None and any(signature.fingerprint is None for signature in self.expected):
            raise ValueError(f"entry {self.name!r} replaces a function, so it needs its body's fingerprint")

    @property
    def kind(self) -> Literal["patched", "relied upon"]:
        return "relied upon" if self.patch is None else "patched"

    @property
    def function(self) -> str:
        return self.target.partition(":")[2]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """An entry whose function is not as expected; `found` is None when there is no such function."""

    entry: Entry
    found: FunctionSource | None

    @property
    def reason(self) -> str:
        """Half a sentence: what changed."""
        module, _, function = self.entry.target.partition(":")
        if self.found is None:
            return f"{function} of {module} does not exist"
        expected = self.entry.expected[-1]
        if self.found.parameters != expected.parameters:
            wanted = expected.parameters
            return f"{function} of {module} takes ({self.found.parameters}) where ({wanted}) was expected"
        return f"the body of {function} of {module} changed"


def minor_version(vllm_version: str) -> tuple[int, int]:
    """(major, minor) of a version such as "0.32.1+cpu"; UnsupportedVllm when it does not start so."""
    match = re.match(r"v?(\d+)\.(\d+)", vllm_version)
    if match is None:
        raise UnsupportedVllm(f"vllm-double cannot tell what vLLM {vllm_version!r} is.")
    return int(match[1]), int(match[2])


def on_platform(entries: Iterable[Entry], platform: str) -> list[Entry]:
    """The entries that matter on `platform` ("cpu", "cuda", ...)."""
    return [entry for entry in entries if entry.platform in ("any", platform)]


def check(entries: Iterable[Entry], root: Path | ZipPath | None = None) -> list[Mismatch]:
    """Compares the sources with the table; an empty list means that all is as expected.

    root: the folder, or wheel, that holds another vLLM than the installed one.
    """
    found = ((entry, read_function(entry.target, root)) for entry in entries)
    return [
        Mismatch(entry, source)
        for entry, source in found
        if source is None or not any(signature.accepts(source) for signature in entry.expected)
    ]


def refusal(vllm_version: str, mismatches: Sequence[Mismatch]) -> UnsupportedVllm:
    """The exception for a non-empty list of mismatches: one sentence, whose first item is explained."""
    first, *others = mismatches
    also = f" (also changed: {', '.join(mismatch.entry.function for mismatch in others)})" if others else ""
    return UnsupportedVllm(
        f"vllm-double was read against vLLM {' and '.join(SUPPORTED)} and cannot work with {vllm_version}, "
        f"where {first.reason}{also}."
    )


def apply(entries: Iterable[Entry], vllm_version: str) -> tuple[str, ...]:
    """Applies the patches of `entries`, after checking all of them; returns the names of what is applied now.

    Raises UnsupportedVllm, with nothing applied, when a function to replace is not the one that was read.
    """
    patched = [entry for entry in entries if entry.patch is not None]
    if mismatches := check(patched):
        raise refusal(vllm_version, mismatches)
    for entry in patched:
        if entry.patch is not None:
            entry.patch.apply()
    return tuple(entry.name for entry in patched)


def revert(entries: Iterable[Entry]) -> None:
    """Puts the original functions back."""
    for entry in entries:
        if entry.patch is not None:
            entry.patch.revert()


def is_applied(entry: Entry) -> bool:
    """True when the entry's replacement is in place in this process; False for one that is relied upon."""
    return entry.patch is not None and entry.patch.is_applied()
