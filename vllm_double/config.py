"""The settings under "double" in --speculative-config: validated, bounded, frozen."""

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

__all__ = ["MAX_SPECULATIVE_TOKENS", "ConfigError", "DoubleConfig", "check_num_speculative_tokens", "nearest"]

MAX_SPECULATIVE_TOKENS = 128
"""vLLM's V1 rejection sampler takes chains of at most so many tokens."""


class ConfigError(ValueError):
    """A setting that cannot work; the message is one sentence for the person who typed it."""


class DoubleConfig(BaseModel):
    """What method "double" takes beyond vLLM's own keys for speculative decoding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # fmt: off
    enabled: bool = Field(True, description="false: check the settings, then run vLLM without method double")
    context_retrieval: bool = Field(True, description="retrieve draft tokens from the request's own prompt and output")
    history_tokens: int = Field(1 << 20, ge=0, le=1 << 30, description=(
        "tokens of earlier answers kept for retrieval, about 70 bytes each in target and draft worker; 0: none. A request "
        "retrieves from its own tenant (cache_salt) only. The tenant that has waited longest for an answer loses tokens first"))
    tenant_share: float = Field(0.5, gt=0, le=1, description=(
        "part of the history that a cache_salt, all tenants without one together, or the requests without a tenant may take "
        "from others; beyond it they lose their own tokens first"))
    share_history: bool = Field(False, description=(
        "requests without a tenant share a history. The speed of an answer then shows whether another request got that text, "
        "as vLLM's prefix caching does for prompts"))
    require_salt: bool = Field(False, description=(
        "a tenant counts only within a cache_salt. Without it, whoever knows a tenant's name can tell by the speed of answers "
        "which texts it got"))
    context_gib: float = Field(2.0, gt=0, le=1024, description=(
        "most memory for the indexes of running requests' texts in GiB, about 90 bytes per token, each in target and draft "
        "worker. A request that finds no room gets no tokens from its own text and the history"))
    datastore: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), description=(
        "file or folder that `vllm-double datastore build` made with the target's tokenizer, or a list of them. All requests "
        "retrieve from it"))
    target_retrieval: bool = Field(True, description="the target verifies retrieved tokens, also behind the draft model's")
    draft_retrieval: bool = Field(True, description="the draft model reads retrieved tokens, several in one forward")
    draft_device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description=(
        'device of the draft model: "cpu", "cuda" (the target\'s own) or "cuda:1" (the first of as many as there are '
        'engines and draft ranks); "auto": the platform\'s'))
    draft_cores: str | None = Field(None, description=(
        'CPU cores of the draft model, such as "1" or "2-3", divided equally among engines and draft ranks. null: the last '
        "cores of this process; the target gets the others"))
    draft_dtype: str = Field("auto", pattern=r"^(auto|float32|float16|bfloat16)$", description=(
        'dtype of the draft model; "auto": vLLM\'s choice (16 bits also for a float32 model), or float32 on a CPU without '
        "16-bit instructions"))
    draft_kv_cache_gib: float = Field(0.25, gt=0, le=1024, description=(
        "memory for the draft model's KV cache in GiB. If it is full, some requests get no draft tokens"))
    draft_page_size: int = Field(32, ge=1, le=1024, description=(
        "tokens per page of the draft model's KV cache. Small pages make branches cheap; the attention backend may need a "
        "multiple of its own size"))
    nodes_per_iteration: int | None = Field(None, ge=1, le=1024, description=(
        "most tokens in one forward of the draft model; null: as many as cost little more than one, measured at the start"))
    children_per_node: int = Field(64, ge=1, le=1024, description="alternatives kept per draft token; 1: a single path")
    min_path_prob: float = Field(1e-3, gt=0, lt=1, description=(
        "least probability of a path that is drafted. On a CPU, less probable paths cost the target more than they give"))
    prefill_tokens: int = Field(256, ge=1, le=65536, description="most prompt tokens in one forward of the draft model")
    wait_for_draft: bool = Field(True, description=(
        "if the outcome of a verification was not prepared, the target may wait for the first draft tokens, if that gives more "
        "tokens than the batch decodes meanwhile; false: never"))
    ray_address: str | None = Field(None, description=(
        '"host:port" of a Ray cluster that includes this machine; null: start an embedded Ray'))
    ray_num_cpus: float = Field(1.0, ge=0, le=1024, description="logical CPUs that the draft worker claims in Ray")
    # fmt: on

    @field_validator("datastore", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else () if value is None else value

    @field_validator("require_salt")
    @classmethod
    def _names_are_not_shared(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("share_history"):
            raise ValueError('with "share_history" a request without a salt would share what its tenant may not')
        return value

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


def nearest(key: Any, known: Any) -> str:
    """The known name that ``key`` most looks like, by as much of it as any such name has."""
    names: list[str] = sorted(known)
    start = str(key)[: max(map(len, names))].lower()
    return max(names, key=lambda name: difflib.SequenceMatcher(None, start, name).ratio())


def check_num_speculative_tokens(value: Any) -> int:
    """The upper bound of a chain's length. Raises ConfigError with one sentence."""
    if value is None:
        raise ConfigError(
            'Method "double" needs "num_speculative_tokens", the largest number of draft tokens in one step, such as 16.'
        )
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SPECULATIVE_TOKENS:
        raise ConfigError(
            f'"num_speculative_tokens" is {value!r}, and must be a whole number from 1 to {MAX_SPECULATIVE_TOKENS}.'
        )
    return value
