"""What the plug-in calls: the version gate of method "double", and the mends of vLLM's CPU sampler."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from functools import cache

from vllm_double.integration.hooks.entries import ENTRIES, MENDS
from vllm_double.integration.hooks.registry import (
    SUPPORTED,
    Entry,
    UnsupportedVllm,
    apply,
    check,
    minor_version,
    on_platform,
    refusal,
)

logger = logging.getLogger(__name__)

MEND_SWITCH = "VLLM_DOUBLE_MEND_CPU_SAMPLER"


def require(vllm_version: str | None = None, platform: str | None = None, entries: Iterable[Entry] = ENTRIES) -> None:
    """Raises UnsupportedVllm unless method "double" can work with the installed vLLM.

    A version newer than those that are tested, but whose hooks all look as expected, passes with one warning
    per process. `vllm_version` and `platform` default to what is installed and detected.
    """
    version = _installed_version() if vllm_version is None else vllm_version
    oldest, newest = minor_version(SUPPORTED[0]), minor_version(SUPPORTED[-1])
    if minor_version(version) < oldest:
        raise UnsupportedVllm(f"vllm-double needs vLLM {SUPPORTED[0]} or newer, and {version} is installed.")
    if mismatches := check(on_platform(entries, _detected_platform() if platform is None else platform)):
        raise refusal(version, mismatches)
    if minor_version(version) > newest:
        _warn_untested(version)


def mend_cpu_sampler(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Mends the sampling of drafted rows on the CPU platform, for every speculative method.

    Returns the names of the mends that are in place. To be called once per process, before or after vLLM
    registered its kernels. Never raises because of vLLM's version: a sampler that is not the one that was
    read is left alone, with a warning. `VLLM_DOUBLE_MEND_CPU_SAMPLER=0` switches the mends off.
    """
    if environ.get(MEND_SWITCH, "1") == "0" or _detected_platform() != "cpu":
        return ()
    try:
        return apply(MENDS, _installed_version())
    except UnsupportedVllm as error:
        logger.warning("vLLM's CPU sampler is left as it is: %s", error)
        return ()


@cache
def _warn_untested(version: str) -> None:
    logger.warning(
        "vllm-double is tested with vLLM %s; %s is newer, but every function it relies on looks the same.",
        " and ".join(SUPPORTED),
        version,
    )


def _installed_version() -> str:
    from vllm.version import __version__

    return str(__version__)


def _detected_platform() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)
