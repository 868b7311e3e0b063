"""The draft engine on vLLM: any decoder model that vLLM loads, ragged batches over a paged cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from double_kernels import fork_pages, insert_guidance, top_branches
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_double.draft.base import Batch, count_outputs
from vllm_double.draft.loader import EngineConfig, load

__all__ = ["EngineConfig", "VllmDraftEngine"]


class VllmDraftEngine:
    """DraftEngine on a vLLM model; see vllm_double.draft.base for what its methods promise.

    One to a process, and not in a process that runs a vLLM engine: vLLM keeps state of its own in the
    process.
    """

    def __init__(self, config: EngineConfig) -> None:
        loaded = load(config)
        model_config = loaded.vllm_config.model_config
        self.page_size = loaded.page_size
        self.num_pages = loaded.num_pages
        self.max_length: int = model_config.max_model_len
        self.vocab_size: int = min(model_config.get_vocab_size(), config.vocab_size or sys.maxsize)
        self._model = loaded.model
        self._vllm_config = loaded.vllm_config
        self._builders = loaded.builders
        self._slot_dim = loaded.slot_dim
        self._caches = _merge(list(loaded.caches.values()))
        self._layer_names = [name for _, names in loaded.builders for name in names]
        self._device = loaded.device

    @torch.inference_mode()
    def forward(self, batch: Batch, num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """See DraftEngine.forward. Ties go to the lower token id."""
        if not 1 <= num_children <= self.vocab_size:
            raise ValueError(f"num_children is {num_children}, the vocabulary has {self.vocab_size} tokens")
        num_outputs = count_outputs(
            batch,
            page_size=self.page_size,
            num_pages=self.num_pages,
            max_length=self.max_length,
            vocab_size=self.vocab_size,
        )
        if not len(batch):
            return _no_outputs(num_children)
        common, token_ids = self._lay_out(batch)
        metadata: dict[str, Any] = {}
        for builder, names in self._builders:
            metadata.update(dict.fromkeys(names, builder.build(0, common)))
        with set_forward_context(
            metadata,
            self._vllm_config,
            num_tokens=common.num_actual_tokens,
            slot_mapping=dict.fromkeys(self._layer_names, common.slot_mapping),
        ):
            hidden = self._model(input_ids=token_ids, positions=common.positions)
            if num_outputs == 0:
                return _no_outputs(num_children)
            if num_outputs < common.num_actual_tokens:
                hidden = hidden[self._tensor(batch.output_indices)]
            logits = self._model.compute_logits(hidden)
        if logits is None:
            return _no_outputs(num_children)  # of several ranks the first has them
        tokens, probs = top_branches(logits[:, : self.vocab_size], num_children, self._temperatures(batch))
        return tokens.cpu().numpy().astype(np.int32), probs.cpu().numpy()

    @torch.inference_mode()
    def copy_slots(self, triples: Sequence[tuple[int, int, int]]) -> None:
        """See DraftEngine.copy_slots."""
        fork_pages(self._caches, triples, page_size=self.page_size, slot_dim=self._slot_dim)

    def _lay_out(self, batch: Batch) -> tuple[CommonAttentionMetadata, torch.Tensor]:
        """Attention metadata with int64 positions and slots [tokens], and token ids int64 [tokens]: guidance without a path."""
        lengths = np.diff(batch.query_start)
        seq_lens = batch.starts + lengths
        block_table = self._tensor(batch.pages)
        query_start_cpu = torch.from_numpy(batch.query_start)
        laid_out = insert_guidance(
            self._tensor(batch.token_ids),
            self._tensor(batch.query_start),
            self._tensor(batch.starts),
            block_table,
            page_size=self.page_size,
        )
        common = CommonAttentionMetadata(
            query_start_loc=laid_out.query_start_loc,
            query_start_loc_cpu=query_start_cpu,
            seq_lens=laid_out.seq_lens,
            num_reqs=len(batch),
            num_actual_tokens=len(batch.token_ids),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=block_table,
            slot_mapping=laid_out.slot_mapping,
            positions=laid_out.positions,
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
        )
        return common, laid_out.input_ids

    def _temperatures(self, batch: Batch) -> torch.Tensor | None:
        """float32 [outputs], or None if all are 1."""
        if ((batch.temperatures == 0.0) | (batch.temperatures == 1.0)).all():
            return None
        values = np.where(batch.temperatures == 0.0, np.float32(1.0), batch.temperatures)
        return self._tensor(np.repeat(values, batch.num_outputs))

    def _tensor(self, array: npt.NDArray[Any]) -> torch.Tensor:
        # The array may change afterwards: from memory that is not pinned CUDA takes what it copies before it returns.
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _no_outputs(num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    return np.empty((0, num_children), dtype=np.int32), np.empty((0, num_children), dtype=np.float32)


def _merge(caches: list[torch.Tensor]) -> list[torch.Tensor]:
    """One view [pages, heads, slots, content, layers] of all layers, if they lie evenly spaced in memory."""
    first = caches[0]
    if len(caches) < 2 or any(
        cache.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        or cache.shape != first.shape
        or cache.stride() != first.stride()
        or cache.dtype != first.dtype
        for cache in caches
    ):
        return caches
    step = caches[1].storage_offset() - first.storage_offset()
    for index, cache in enumerate(caches):
        if cache.storage_offset() != first.storage_offset() + index * step:
            return caches
    shape = (*first.shape, len(caches))
    return [first.as_strided(shape, (*first.stride(), step), first.storage_offset())]
