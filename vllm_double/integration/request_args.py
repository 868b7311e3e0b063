"""A request's own settings: `extra_args={"double": {"enabled": false, "tenant": "a"}}`, and vLLM's `cache_salt`.

vLLM's HTTP server takes no objects in `vllm_xargs`, so the object may also come as JSON text.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from vllm_double.config import ConfigError, nearest

__all__ = ["RequestArgs", "digest"]

_KEYS = ("enabled", "tenant")


@dataclass(frozen=True, slots=True)
class RequestArgs:
    """enabled: whether it gets draft tokens. tenant: whose history it shares, within its cache_salt; None: not given."""

    enabled: bool = True
    tenant: str | None = None

    @classmethod
    def parse(cls, extra_args: dict[str, Any] | None) -> "RequestArgs":
        """Raises ConfigError with one sentence."""
        raw = (extra_args or {}).get("double", {})
        if isinstance(raw, str):
            try:
                raw = json.loads(raw)
            except (ValueError, RecursionError):
                raise ConfigError('"double" of a request is text, but not JSON.') from None
        if not isinstance(raw, dict):
            raise ConfigError(f'"double" of a request takes an object, not one of type {type(raw).__name__}.')
        for key in raw:
            if key not in _KEYS:
                raise ConfigError(f'"double" of a request has no key {key!r}; the nearest one is "{nearest(key, _KEYS)}".')
        enabled, tenant = raw.get("enabled", True), raw.get("tenant")
        if not isinstance(enabled, bool):
            raise ConfigError('"enabled" in "double" of a request must be true or false.')
        if tenant is not None and not (isinstance(tenant, str) and tenant):
            raise ConfigError('"tenant" in "double" of a request must be text, and not empty.')
        return cls(enabled, tenant)


def digest(*values: object) -> str:
    """A name that is equal for equal values only, so that no request can get the name of another value."""
    return hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()
