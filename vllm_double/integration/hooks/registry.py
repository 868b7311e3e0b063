"""The form of the table of hooks, and the check of an installed vLLM against it.

An `Entry` names one function of vLLM, `Names` what else is imported or read. With a `patch` we replace a function, so its whole
body has to be the one that was read; without one we call, wrap or override it, so only its parameters have to be.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from vllm_double.integration.hooks.cpu_sampler import KernelMend
from vllm_double.integration.hooks.source import Root, names_in, read_function

__all__ = ["SUPPORTED", "Entry", "Names", "UnsupportedVllm", "check", "installed_version", "platform", "refusal", "require"]

_logger = logging.getLogger(__name__)

SUPPORTED: tuple[str, ...] = ("0.31", "0.32")
"""Minor versions of vLLM that our tests run against, oldest first."""


class UnsupportedVllm(RuntimeError):  # noqa: N818 (reads as what it says)
    """The installed vLLM is not one that method "double" can work with; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One function of vLLM that we replace (``patch`` is set) or rely upon.

    target: "module:qualified.name". parameters: those that we rely on, without annotations; "..." at the end: what follows is
    passed on. superfluous_once: the upstream change after which the entry can go. fingerprint: of the body.
    """

    target: str
    parameters: str
    what: str
    why: str
    superfluous_once: str
    fingerprint: str = ""
    patch: KernelMend | None = None

    def __post_init__(self) -> None:
        if self.patch is not None and not self.fingerprint:
            raise ValueError(f"the entry for {self.target} replaces a function, so it needs its body's fingerprint")

    @property
    def function(self) -> str:
        """The qualified name of the function."""
        return self.target.partition(":")[2]

    def mismatch(self, root: Root | None) -> str:
        """What of the function is not as expected, as a part of a sentence; empty if all is."""
        found = read_function(self.target, root)
        name = f"{self.function} of {self.target.partition(':')[0]}"
        if found is None:
            return f"{name} does not exist"
        if not self._accepts(found.parameters):
            return f"{name} takes ({', '.join(found.parameters)}) where ({self.parameters}) was expected"
        return f"the body of {name} changed" if self.fingerprint not in ("", found.fingerprint) else ""

    def _accepts(self, found: Sequence[str]) -> bool:
        """Whether there are the expected parameters, and behind them only such as may be left out."""
        expected = self.parameters.split(", ") if self.parameters else []
        goes_on = expected[-1:] == ["..."]
        expected = expected[: len(expected) - goes_on]
        rest = found[len(expected) :]
        return list(found[: len(expected)]) == expected and (goes_on or all("=" in part or part[0] == "*" for part in rest))


@dataclass(frozen=True, slots=True)
class Names:
    """Names that we import from a module, or read from the objects of a class: "module" or "module:Class"."""

    target: str
    names: str  # separated by blanks

    def mismatch(self, root: Root | None) -> str:
        """As for an Entry."""
        there = names_in(self.target, root)
        missing = [name for name in self.names.split() if name not in there]
        return f"{' and '.join(missing)} of {self.target.replace(':', '.')} cannot be found" if missing else ""


def check(entries: Iterable[Entry | Names], root: Root | None = None) -> list[str]:
    """What is not as the table expects, each as a part of a sentence; an empty list means that all is.

    root: the folder, or wheel, that holds another vLLM than the installed one.
    """
    return [mismatch for entry in entries if (mismatch := entry.mismatch(root))]


def refusal(vllm_version: str, mismatches: Sequence[str]) -> UnsupportedVllm:
    """The exception for a non-empty list of mismatches: one sentence, which explains the first one."""
    others = f", and {len(mismatches) - 1} more differ: see `vllm-double check`" if mismatches[1:] else ""
    return UnsupportedVllm(
        f"vllm-double was read against vLLM {' and '.join(SUPPORTED)} and cannot work with {vllm_version}, "
        f"where {mismatches[0]}{others}."
    )


def require(entries: Iterable[Entry | Names], vllm_version: str | None = None, device_type: str | None = None) -> None:
    """Raises UnsupportedVllm unless method "double" can work with the installed vLLM.

    A version newer than those that are tested, but whose hooks all look as expected, passes with one warning per process. The
    mends of the CPU sampler matter on a CPU only.
    """
    version = installed_version() if vllm_version is None else vllm_version
    oldest, newest = _minor(SUPPORTED[0]), _minor(SUPPORTED[-1])
    if _minor(version) < oldest:
        raise UnsupportedVllm(f"vllm-double needs vLLM {SUPPORTED[0]} or newer, and {version} is installed.")
    on_cpu = (platform() if device_type is None else device_type) == "cpu"
    if mismatches := check(entry for entry in entries if on_cpu or getattr(entry, "patch", None) is None):
        raise refusal(version, mismatches)
    if _minor(version) > newest:
        _warn_untested(version)


@cache
def _warn_untested(version: str) -> None:
    _logger.warning(
        "vllm-double is tested with vLLM %s; %s is newer, but every function it relies on looks the same.",
        " and ".join(SUPPORTED),
        version,
    )


def _minor(vllm_version: str) -> tuple[int, int]:
    """(major, minor) of a version such as "0.32.1+cpu"; UnsupportedVllm if it does not start so."""
    match = re.match(r"v?(\d+)\.(\d+)", vllm_version)
    if match is None:
        raise UnsupportedVllm(f"vllm-double cannot tell what vLLM {vllm_version!r} is.")
    return int(match[1]), int(match[2])


def installed_version() -> str:
    from vllm.version import __version__

    return str(__version__)


def platform() -> str:
    """ "cpu", "cuda", ..., as vLLM has detected it."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)
