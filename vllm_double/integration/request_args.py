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
_MOST_TEXT, _MOST_TENANT = 4096, 256  # characters


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
            if len(raw) > _MOST_TEXT:
                raise ConfigError(f'"double" of a request is text of more than {_MOST_TEXT} characters.')
            try:
                raw = json.loads(raw)
            except (ValueError, RecursionError):
                raise ConfigError('"double" of a request is text, but not JSON.') from None
        if not isinstance(raw, dict):
            raise ConfigError(f'"double" of a request takes an object, not one of type {type(raw).__name__}.')
        for key in raw:
            if not isinstance(key, str):
                raise ConfigError(f'"double" of a request has a key of type {type(key).__name__}, and takes text.')
            if key not in _KEYS:
                known = nearest(key, _KEYS)
                raise ConfigError(f'"double" of a request has no key {key[:_MOST_TENANT]!r}; the nearest one is "{known}".')
        enabled, tenant = raw.get("enabled", True), raw.get("tenant")
        if not isinstance(enabled, bool):
            raise ConfigError('"enabled" in "double" of a request must be true or false.')
        if tenant is not None and not (isinstance(tenant, str) and tenant):
            raise ConfigError('"tenant" in "double" of a request must be text, and not empty.')
        if tenant is not None and len(tenant) > _MOST_TENANT:
            raise ConfigError(f'"tenant" in "double" of a request has more than {_MOST_TENANT} characters.')
        return cls(enabled, tenant)


def digest(*values: object) -> str:
    """A name that is equal for equal values only, so that no request can get the name of another value."""
    return hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()
