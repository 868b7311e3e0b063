"""What `--speculative-config '{"method":"double",...}'` becomes: a SpeculativeConfig that vLLM's engine understands.

To vLLM it is a custom proposer class. The draft's own settings stay on the object, which is pickled into the engine and its
workers. Everything that cannot work is refused here, in the first process, before weights are loaded.
"""

import os
import secrets
import socket
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError
from vllm.config import LoadConfig, ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import config

from vllm_double.config import ConfigError, DoubleConfig, check_num_speculative_tokens, nearest
from vllm_double.hosting.cores import CoreSplit, read_topology, split_cores
from vllm_double.integration.front_end import allow_v2, bind_target, check_requests
from vllm_double.integration.tokenizers import check_datastores, check_same_tokenizer

__all__ = ["SCHEDULER_PATH", "DoubleSpeculativeConfig", "build"]

MAX_DRAFT_RANKS = 64
_METRICS_KEY = "_VLLM_DOUBLE_METRICS_KEY"

PROPOSER_PATH = "vllm_double.integration.v1.DoubleProposer"
SCHEDULER_PATH = "vllm_double.integration.engine_core.DoubleScheduler"

_DRAFT_KEYS = frozenset(
    {"model", "revision", "code_revision", "quantization", "max_model_len", "draft_tensor_parallel_size", "draft_load_config",
     "kv_cache_dtype", "attention_backend", "enforce_eager", "moe_backend"}
)  # fmt: skip
_COMMON_KEYS = frozenset({"method", "num_speculative_tokens", "double", "target_model_config", "target_parallel_config"})
_REFUSED = {
    "rejection_sample_method": ("standard", "other rejection samplers than the standard one"),
    "draft_sample_method": ("greedy", "sampled drafts"),
    "parallel_drafting": (False, "parallel_drafting (the draft already runs beside the target)"),
    "use_heterogeneous_vocab": (False, "a draft with another vocabulary"),
    "num_speculative_tokens_per_batch_size": (
        None,
        "a fixed table of chain lengths (they follow measured cost)",
    ),
}


@config(config=ConfigDict(extra="forbid"))
class DoubleSpeculativeConfig(SpeculativeConfig):
    """SpeculativeConfig of method "double": for vLLM a custom proposer class, for us what the user asked for."""

    double: Any = None
    """DoubleConfig: our own settings."""
    draft: Any = field(default_factory=dict)
    """dict: vLLM's standard keys, of the draft model; empty if there is none and retrieval alone drafts."""
    datastores: Any = ()
    """tuple of (absolute path, fingerprint of the tokenizer in hexadecimal): Sources.datastores."""
    cores: Any = None
    """CoreSplit of target and draft on CPU, of all engines of this machine; None if nothing is to be bound."""
    num_engines: int = 1
    """Engines of this machine, each with its own draft: more than one with data parallelism."""
    metrics_key: str = ""
    """Names the control socket of each engine."""
    launcher: int = 0
    """The process that launches the engine; the engine ends with it."""

    def __post_init__(self) -> None:
        self.method = "custom_class"
        self.model = PROPOSER_PATH
        super().__post_init__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _teach_process()


def build(raw: dict[str, Any]) -> DoubleSpeculativeConfig | None:
    """The configuration from the user's keys and vLLM's target configs; None if drafting is switched off.

    Raises ConfigError with one sentence.
    """
    known = _DRAFT_KEYS | _COMMON_KEYS
    standard = {entry.name for entry in fields(SpeculativeConfig)}
    draft: dict[str, Any] = {}
    for key, value in raw.items():
        if key in _REFUSED:
            expected, what = _REFUSED[key]
            if value != expected:
                raise ConfigError(f'Method "double" does not support {what}: leave out "{key}".')
        elif key in _DRAFT_KEYS:
            if value is not None:
                draft[key] = value
        elif key not in known:
            if key in standard:
                raise ConfigError(f'"{key}" has no meaning for method "double": leave it out.')
            raise ConfigError(f'--speculative-config has no key {key!r}; the nearest one is "{nearest(key, known)}".')
    num_tokens = check_num_speculative_tokens(raw.get("num_speculative_tokens"))
    double = DoubleConfig.parse(raw.get("double"))
    target: ModelConfig = raw["target_model_config"]
    parallel: ParallelConfig = raw["target_parallel_config"]
    _check_target(target, parallel)
    num_engines = max(parallel.data_parallel_size_local, 1)  # 0: all are on other machines
    if draft.get("model") is not None:
        _check_draft(draft, double, target, num_engines)
    elif draft:
        raise ConfigError(f'"{next(iter(draft))}" is a setting of the draft model, and there is no "model".')
    datastores = check_datastores(target, double.datastore)
    if not double.enabled:
        return None  # plain vLLM, asynchronous scheduling and all: nothing of ours can cost anything
    num_ranks = num_engines * parallel.tensor_parallel_size
    cores = _bind_cores(double, num_ranks, num_engines * draft["draft_tensor_parallel_size"]) if draft else None
    _teach_process()
    return DoubleSpeculativeConfig(
        num_speculative_tokens=num_tokens,
        target_model_config=target,
        target_parallel_config=parallel,
        double=double,
        draft_load_config=draft.pop("draft_load_config", None),
        draft=draft,
        datastores=datastores,
        cores=cores,
        num_engines=num_engines,
        metrics_key=_metrics_key(parallel),
        launcher=os.getpid(),
    )


def _metrics_key(parallel: ParallelConfig) -> str:
    """A new one; in a further front end that of the first process, which launched the engines: each builds a configuration."""
    if parallel._api_process_count > 1 and parallel._api_process_rank >= 0:
        return os.environ[_METRICS_KEY]
    key = secrets.token_hex(8)
    if parallel._api_process_count > 1:
        os.environ[_METRICS_KEY] = key
    return key


def _teach_process() -> None:
    check_requests(DoubleSpeculativeConfig)
    allow_v2(DoubleSpeculativeConfig)
    bind_target(DoubleSpeculativeConfig)


def _check_target(target: ModelConfig, parallel: ParallelConfig) -> None:
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError('Method "double" does not support pipeline parallelism: use tensor parallelism instead.')
    if parallel.distributed_executor_backend == "external_launcher":
        raise ConfigError('Method "double" does not support the external launcher.')
    if target.is_hybrid or target.is_attention_free:
        raise ConfigError(
            f'Method "double" does not support hybrid or recurrent targets ({", ".join(target.architectures)}): their state '
            "cannot go back when a draft is rejected."
        )
    if getattr(target, "use_fp64_gumbel", False):
        raise ConfigError('Method "double" does not support noise in float64: leave out --use-fp64-gumbel.')
    if target.runner_type != "generate":
        raise ConfigError(f'Method "double" is for models that generate text, not for a {target.runner_type} model.')


def _check_draft(draft: dict[str, Any], double: DoubleConfig, target: ModelConfig, num_engines: int) -> None:
    model = draft["model"]
    if not isinstance(model, str) or not model:
        raise ConfigError(f'"model" is {model!r}, and must be the path or the name of a draft model.')
    _check_place(model)
    size = draft.setdefault("draft_tensor_parallel_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_DRAFT_RANKS:
        raise ConfigError(f'"draft_tensor_parallel_size" is {size!r}, and must be a whole number from 1 to {MAX_DRAFT_RANKS}.')
    for key in ("kv_cache_dtype", "attention_backend", "moe_backend"):
        if draft.pop(key, None) not in (None, "auto"):
            raise ConfigError(f'"{key}" cannot be set for the draft of method "double".')
    if isinstance(draft.get("draft_load_config"), dict):
        draft["draft_load_config"] = _load_config(draft["draft_load_config"])
    if draft.get("enforce_eager") is None:
        draft["enforce_eager"] = target.enforce_eager  # as in vLLM
    elif not isinstance(draft["enforce_eager"], bool):
        raise ConfigError(f'"enforce_eager" is {draft["enforce_eager"]!r}, and must be true or false.')
    check_same_tokenizer(target, model, draft.get("revision"))
    length = draft.get("max_model_len")
    if length is not None and (not isinstance(length, int) or not 1 <= length <= target.max_model_len):
        raise ConfigError(f'"max_model_len" is {length!r}, and must be from 1 to the target\'s {target.max_model_len}.')
    _check_device(double.draft_device, size, num_engines)
    if double.ray_address is not None:
        _check_reachable(double.ray_address)


def _check_place(model: str) -> None:
    """A folder, or what may be a repository's name: the two forms in which a draft is found."""
    path = Path(model).expanduser()
    if path.is_dir():
        return
    fault = ""
    if "://" in model:
        fault = "is an address"
    elif path.exists():
        fault = "is a file"
    elif model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        fault = "does not exist"
    if fault:
        raise ConfigError(
            f'The draft model "{model}" {fault}: "model" takes a folder that holds config.json and weights, or the name of a '
            'repository, such as "Qwen/Qwen3-0.6B".'
        )


def _load_config(values: dict[str, Any]) -> LoadConfig:
    try:
        return LoadConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f'"draft_load_config": {{"{name}": {first["input"]!r}}} is not possible: {first["msg"]}.') from None


def _check_device(device: str, num_ranks: int, num_engines: int) -> None:
    from vllm.platforms import current_platform

    built_for = current_platform.device_type
    if device == "cpu" and built_for != "cpu":
        raise ConfigError(
            f'"draft_device" is "cpu", but this vLLM is built for {built_for}: the draft needs such a device, too.'
        )
    on_cpu = device == "cpu" or (device == "auto" and current_platform.is_cpu())
    if num_ranks > 1 and not on_cpu and ":" not in device:
        raise ConfigError('"draft_tensor_parallel_size" needs a "draft_device" such as "cuda:4": the first of as many devices.')
    if not device.startswith("cuda"):
        return
    import torch

    index = int(device.partition(":")[2] or 0)
    count = torch.cuda.device_count()
    if index >= count:
        there = f"there are {count} of them" if count else "there is none"
        raise ConfigError(f'"draft_device" is "{device}", but no such CUDA device exists: {there}.')
    if ":" in device and index + num_ranks * num_engines > count:
        raise ConfigError(
            f'"draft_device": "{device}" leaves {count - index} CUDA device(s) for {num_engines} draft(s) on {num_ranks} each.'
        )


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except OSError as error:
        raise ConfigError(f'No Ray cluster answers at "ray_address" {address}: {error}.') from None


def _bind_cores(double: DoubleConfig, num_ranks: int, num_draft_ranks: int) -> CoreSplit | None:
    """On CPU the target's and the draft's cores are disjoint; decided before the executor spawns its workers."""
    from vllm import envs
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        if double.draft_cores is not None:
            raise ConfigError('"draft_cores" is for a draft on the CPU, and it runs on another device.')
        return None
    try:
        split = split_cores(
            os.sched_getaffinity(0),
            draft=double.draft_cores,
            target=envs.VLLM_CPU_OMP_THREADS_BIND,
            num_draft=num_draft_ranks,
            num_ranks=num_ranks,
            topology=read_topology(),
        )
        if len(split.draft) % num_draft_ranks:
            raise ValueError(f"{len(split.draft)} core(s) cannot be divided among {num_draft_ranks} draft ranks.")
    except ValueError as error:
        raise ConfigError(f'"draft_cores": {error}') from None
    return split
