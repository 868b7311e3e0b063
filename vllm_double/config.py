"""The settings under "double" in --speculative-config: validated, bounded, frozen."""

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

__all__ = ["MAX_SPECULATIVE_TOKENS", "ConfigError", "DoubleConfig", "check_num_speculative_tokens", "nearest"]

MAX_SPECULATIVE_TOKENS = 128
"""vLLM's V1 rejection sampler takes chains of at most so many tokens."""


class ConfigError(ValueError):
    """A setting that cannot work; the message is one sentence for the person who typed it."""


class DoubleConfig(BaseModel):
    """What method "double" takes beyond vLLM's own keys for speculative decoding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(True, description="false: the settings are checked and vLLM then runs as if they were not there")
    context_retrieval: bool = Field(True, description="retrieve continuations from the request's own prompt and output")
    history_tokens: int = Field(
        1 << 20, ge=0, le=1 << 30, description="tokens of earlier answers that are kept to retrieve from, those dropped first "
        "that have waited longest for another of their tenant's; about 70 bytes each on either side. A request is offered its "
        "own tenant's (cache_salt) only; 0: none are kept",
    )  # fmt: skip
    share_history: bool = Field(
        False, description="requests without a tenant share a history: how fast an answer comes then tells whether another got "
        "it before, as vLLM's prefix caching does for prompts",
    )  # fmt: skip
    datastore: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="file or folder that `vllm-double datastore build` made with the target's tokenizer, or a list of "
        "such; all requests are offered what is in them",
    )  # fmt: skip
    target_retrieval: bool = Field(True, description="the target verifies retrieved tokens, those behind the draft's too")
    draft_retrieval: bool = Field(True, description="the draft model reads retrieved tokens, several in one forward")
    draft_device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description='the draft\'s device: "cpu", "cuda" (the target\'s own), '
        '"cuda:1" (the first of as many as there are engines and draft ranks); "auto": the platform\'s',
    )  # fmt: skip
    draft_cores: str | None = Field(
        None, description='CPU cores of the draft, as "1" or "2-3", in equal parts for all engines and draft ranks; null: the '
        "last ones that this process may use, and the target gets the others",
    )  # fmt: skip
    draft_dtype: str = Field(
        "auto",
        pattern=r"^(auto|float32|float16|bfloat16)$",
        description='"auto": as vLLM chooses (16 bits for a float32 draft, too), or float32 on a CPU that is slow in it',
    )
    draft_kv_cache_gib: float = Field(
        0.25,
        gt=0,
        le=1024,
        description="memory for the draft's KV cache in GiB; when full, some requests go without a draft",
    )
    draft_page_size: int = Field(
        32, ge=1, le=1024, description="tokens in a page of the draft's KV cache; small pages make branches cheap. The "
        "attention backend may ask for a multiple of its own",
    )  # fmt: skip
    nodes_per_iteration: int | None = Field(
        None, ge=1, le=1024, description="tokens that one draft forward takes at most; null: as many as cost little more than "
        "one, which the draft measures when it starts",
    )  # fmt: skip
    children_per_node: int = Field(
        64, ge=1, le=1024, description="alternatives that are kept per drafted token; 1 is a single path"
    )
    min_path_prob: float = Field(
        1e-3,
        gt=0,
        lt=1,
        description="continuations less probable than this are not drafted: on a CPU such work takes more from the target than "
        "it brings",
    )
    prefill_tokens: int = Field(256, ge=1, le=65536, description="prompt tokens that one draft forward reads at most")
    wait_for_draft: bool = Field(
        True, description="behind an outcome that the draft did not prepare for, the target may wait for its first tokens, if "
        "these are worth more than what the whole batch decodes meanwhile; false: never",
    )  # fmt: skip
    ray_address: str | None = Field(
        None,
        description='"host:port" of a Ray cluster that spans this machine; null: an embedded Ray of our own',
    )
    ray_num_cpus: float = Field(1.0, ge=0, le=1024, description="logical CPUs that the draft actor claims in Ray")

    @field_validator("datastore", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else () if value is None else value

    @field_validator("ray_address")
    @classmethod
    def _has_port(cls, value: str | None) -> str | None:
        if value is not None:
            host, colon, port = value.rpartition(":")
            if not (host and colon and port.isdigit() and "/" not in host):
                raise ValueError(f'{value!r} is not of the form "host:port"')
        return value

    @classmethod
    def parse(cls, raw: Any) -> "DoubleConfig":
        """The settings from the value of "double". Raises ConfigError with one sentence."""
        if raw is None:
            return cls()
        if not isinstance(raw, dict):
            raise ConfigError(f'"double" takes an object with settings, not {raw!r}.')
        for key in raw:
            if key not in cls.model_fields:
                raise ConfigError(f'"double" has no setting {key!r}; the nearest one is "{nearest(key, cls.model_fields)}".')
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f'"double": {{"{name}": {first["input"]!r}}} is not possible: {reason}.') from None


def nearest(key: str, known: Any) -> str:
    """The known name that ``key`` most looks like."""
    names: list[str] = sorted(known)
    return max(names, key=lambda name: difflib.SequenceMatcher(None, str(key).lower(), name).ratio())


def check_num_speculative_tokens(value: Any) -> int:
    """The upper bound of a chain's length. Raises ConfigError with one sentence."""
    if value is None:
        raise ConfigError(
            'Method "double" needs "num_speculative_tokens", the most draft tokens verified in one step (16, say).'
        )
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SPECULATIVE_TOKENS:
        raise ConfigError(
            f'"num_speculative_tokens" is {value!r}, and must be a whole number from 1 to {MAX_SPECULATIVE_TOKENS}.'
        )
    return value
