"""Loads a vLLM decoder model without vLLM's engine: model, paged key/value cache, metadata builders.

The process is the draft worker's own, and so is vLLM's process-wide state (distributed groups, forward context).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.envs import enable_envs_cache
from vllm.ir.op import set_default_torch_wrap
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend, init_kv_cache
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
from vllm.v1.worker.workspace import init_workspace_manager

from vllm_double.draft.engine.config import EngineConfig
from vllm_double.draft.engine.cuda_graphs import bucket_sizes
from vllm_double.draft.engine.shortcuts import register_cpu_norms, shorten_dispatch

__all__ = ["EngineConfig", "LoadedModel", "load"]

_PAGE_SIZES = (8, 16, 32, 64, 128, 256, 512)
_VLLM_ARGS = (
    "model", "revision", "code_revision", "quantization", "dtype", "max_model_len", "trust_remote_code", "seed",
    "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size",
)  # fmt: skip
"""Fields of EngineConfig that are called as in vLLM."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The parts of a forward.

    caches: layer name to its part of the cache, pages in dimension 0; a layer that shares is not listed.
    builders: attention metadata builder and the layers that take what it builds.
    slot_dim: dimension of a cache that counts the slots of a page, None if the backend hides it.
    eager_because: why forwards cannot be recorded as CUDA graphs; empty if they can.
    """

    vllm_config: VllmConfig
    model: Any
    device: torch.device
    page_size: int
    num_pages: int
    caches: dict[str, torch.Tensor]
    builders: tuple[tuple[Any, tuple[str, ...]], ...]
    slot_dim: int | None
    eager_because: str


def load(config: EngineConfig) -> LoadedModel:
    """Load the model and allocate its cache. Raises ValueError for a model or device that cannot draft."""
    device = torch.device(config.device)
    if device.type != current_platform.device_type:
        built_for = current_platform.device_type
        raise ValueError(f"the draft's device is {config.device}, but this vLLM is built for {built_for}")
    vllm_config = _vllm_config(config)
    _check_drafts(vllm_config)
    if device.type == "cpu":
        # A process has to ask for the tile registers, or vLLM's attention in bfloat16 ends it with an illegal instruction.
        torch.cpu._init_amx()
        # get_model() calls them, and torch raises where there is no accelerator; as vLLM's CPU worker does.
        torch.accelerator.empty_cache = torch.accelerator.synchronize = lambda *_, **__: None
        register_cpu_norms(vllm_config)
    else:
        torch.accelerator.set_device_index(device)
    # What vLLM's worker sets when it starts.
    vllm_config.kernel_config.ir_op_priority.set_default()
    set_default_torch_wrap(vllm_config.compilation_config.ir_enable_torch_wrap)
    with set_current_vllm_config(vllm_config):
        _init_distributed(vllm_config, device, config)
        model = _load_model(vllm_config)
        if device.type != "cpu":
            init_workspace_manager(device)
        loaded = _allocate(vllm_config, model, device, config)
    shorten_dispatch(vllm_config)
    enable_envs_cache()
    torch.set_num_threads(config.num_threads)
    return loaded


def _vllm_config(config: EngineConfig) -> VllmConfig:
    args: dict[str, Any] = {
        **config.loading,
        **{name: getattr(config, name) for name in _VLLM_ARGS},
        "enforce_eager": bool(config.eager_because),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        # One block table for all layers; layers with a sliding window still attend within it only.
        "disable_hybrid_kv_cache_manager": True,
        "kv_cache_memory_bytes": config.kv_cache_bytes,
        "num_gpu_blocks_override": config.num_pages,
        # Nothing may be spawned, and a Ray worker that we run in is not to be taken for vLLM's.
        "distributed_executor_backend": "uni",
        "disable_custom_all_reduce": config.tensor_parallel_size > 1,  # each rank sees one device, by the same number
    }
    if not config.eager_because:
        # Decodes in graphs, nothing compiled. By the sizes attention backends choose buffers that a recording may keep.
        args["compilation_config"] = {
            "mode": CompilationMode.NONE,
            "cudagraph_mode": CUDAGraphMode.FULL_DECODE_ONLY,
            "cudagraph_capture_sizes": bucket_sizes(config.max_rows),
        }
    if config.page_size is not None:
        args["block_size"] = config.page_size
    vllm_config = EngineArgs(**args).create_engine_config()
    if config.longest_text is not None and vllm_config.model_config.max_model_len > config.longest_text:
        args["max_model_len"] = config.longest_text
        vllm_config = EngineArgs(**args).create_engine_config()
    if config.dtype == "auto" and config.device == "cpu" and _is_slow_on_cpu(vllm_config):
        vllm_config = EngineArgs(**{**args, "dtype": "float32"}).create_engine_config()
    return vllm_config


def _load_model(vllm_config: VllmConfig) -> Any:
    try:
        return get_model(vllm_config=vllm_config)
    except RuntimeError as error:
        if "Cannot find any model weights" in str(error):
            raise ValueError(f"there are no weights of {vllm_config.model_config.model}") from error
        raise


def _is_slow_on_cpu(vllm_config: VllmConfig) -> bool:
    """Whether the weights' 16-bit type has no instructions here: float32 is then twice as fast at 8 rows."""
    if vllm_config.model_config.quantization is not None or vllm_config.model_config.dtype == torch.float32:
        return False
    capabilities = torch.cpu.get_capabilities()
    return not any(capabilities.get(name) for name in ("bf16", "avx512_bf16", "amx_bf16"))


def _check_drafts(vllm_config: VllmConfig) -> None:
    model_config = vllm_config.model_config
    for refused, why in (
        (model_config.runner_type != "generate", "does not generate text"),
        (model_config.is_encoder_decoder, "is an encoder-decoder"),
        (model_config.has_inner_state or model_config.is_attention_free, "keeps a state that cannot be rewound"),
        (model_config.uses_mrope, "needs multimodal positions"),
    ):
        if refused:
            raise ValueError(f"{model_config.model} cannot draft: it {why}")


def _init_distributed(vllm_config: VllmConfig, device: torch.device, config: EngineConfig) -> None:
    backend, size = current_platform.dist_backend, config.tensor_parallel_size
    if not torch.distributed.is_initialized():
        # vLLM joins the group that is there; this one needs no port.
        store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]
        if size > 1:
            store = torch.distributed.FileStore(config.rendezvous, size)  # type: ignore[attr-defined]
            # By which vLLM's CPU ranks find their shared memory: each server's runtime folder has a name of its own.
            os.environ["VLLM_DIST_IDENT"] = "-".join(Path(config.rendezvous).parts[-2:])
        torch.distributed.init_process_group(backend=backend, store=store, rank=config.rank, world_size=size)
    init_worker_distributed_environment(vllm_config, config.rank, None, device.index or 0, backend)


def _allocate(vllm_config: VllmConfig, model: Any, device: torch.device, config: EngineConfig) -> LoadedModel:
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    backends = {layer.get_attn_backend() for layer in layers.values()}
    cache_config = vllm_config.cache_config
    if config.page_size is None:
        cache_config.block_size = next((size for size in _PAGE_SIZES if _all_take(backends, size)), cache_config.block_size)
    page_size: int = cache_config.block_size
    if not _all_take(backends, page_size):
        names = {backend.get_name(): backend.get_supported_kernel_block_sizes() for backend in backends}
        raise ValueError(f"page_size is {page_size}, the attention backends take {names}")

    specs = get_kv_cache_spec(vllm_config)
    if not all(isinstance(spec, AttentionSpec) for spec in specs.values()):
        raise ValueError("the draft model has layers without a paged key/value cache: it cannot be rewound")
    groups = get_kv_cache_groups(vllm_config, specs)
    if len(groups) != 1:
        raise ValueError(f"the draft model's layers need {len(groups)} different block tables, one is supported")
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
    resolve_kv_cache_layout(vllm_config, [layouts], specs.values())
    kv_cache_config = get_kv_cache_config_from_groups(vllm_config, groups, config.kv_cache_bytes)
    if kv_cache_config.num_blocks < 2:
        raise ValueError(f"kv_cache_bytes is {config.kv_cache_bytes}: that is no room for two pages")

    attention_groups, _, kernel_block_sizes = init_attn_backend(kv_cache_config, vllm_config, device)
    context = vllm_config.compilation_config.static_forward_context
    caches = init_kv_cache(context, kv_cache_config, device, kernel_block_sizes, vllm_config)
    if kernel_block_sizes != [page_size] or groups[0].kv_cache_spec.block_size != page_size:
        raise ValueError(f"the attention kernels split pages of {page_size} tokens into {kernel_block_sizes}")
    # vLLM's caches are [pages, heads, slots, content], but its CPU kernels lay a page out as they like.
    has_slots = device.type != "cpu" and all(cache.ndim == 4 and cache.shape[2] == page_size for cache in caches.values())
    return LoadedModel(
        vllm_config=vllm_config,
        model=model,
        device=device,
        page_size=page_size,
        num_pages=kv_cache_config.num_blocks,
        caches={name: caches[name] for name in specs},
        builders=tuple((group.get_metadata_builder(0), tuple(group.layer_names)) for group in attention_groups[0]),
        slot_dim=2 if has_slots else None,
        eager_because=config.eager_because or _not_recordable(vllm_config, attention_groups[0]),
    )


def _not_recordable(vllm_config: VllmConfig, groups: list[Any]) -> str:
    """Why vLLM would not record decodes of this model; empty if it would."""
    if not vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        return "vLLM records no CUDA graphs of this model here"
    for group in groups:
        support = group.get_metadata_builder(0).get_cudagraph_support(vllm_config, group.kv_cache_spec)
        if support is AttentionCGSupport.NEVER:
            return f"the attention backend {group.backend.get_name()} cannot be recorded"
    return ""


def _all_take(backends: set[Any], page_size: int) -> bool:
    """Whether pages of this size need no splitting for any backend."""
    return all(
        any(page_size == size if isinstance(size, int) else page_size % size.base == 0 for size in sizes)
        for sizes in (backend.get_supported_kernel_block_sizes() for backend in backends)
    )
