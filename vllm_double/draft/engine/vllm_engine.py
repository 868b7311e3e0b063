"""The draft engine on vLLM: any decoder model that vLLM loads, ragged batches over a paged cache."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from double_kernels import Noise, Support, fork_pages, top_branches
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_double.draft.engine.base import Batch, Row
from vllm_double.draft.engine.cuda_graphs import CudaRecorder, Recorder, StepGraphs, StepInputs, bucket_sizes, record_steps
from vllm_double.draft.engine.loader import EngineConfig, load

__all__ = ["EngineConfig", "VllmDraftEngine"]

logger = logging.getLogger("vllm.double")  # in this process vLLM's handlers write what the server's log repeats


class VllmDraftEngine:
    """DraftEngine on a vLLM model; see vllm_double.draft.engine.base for its methods.

    One to a process, and not in a process that runs a vLLM engine: vLLM keeps state of its own there. If forwards of few tokens
    are replayed (see cuda_graphs), their padding writes to page 0.
    """

    def __init__(self, config: EngineConfig, recorder: Recorder | None = None) -> None:
        """``recorder``: of draft steps, on any device; None is CUDA's, if draft steps can be recorded."""
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
        self._num_children = min(config.num_children, self.vocab_size)
        self._graphs: StepGraphs | None = None
        if loaded.eager_because and recorder is None:
            level = logging.INFO if config.eager_because else logging.WARNING  # as asked for, or not
            logger.log(level, "The draft runs eagerly: %s.", loaded.eager_because)
        else:
            self.forward(Batch.of([Row([0], 0, [0], 1, 0.0)]), 1)  # longer forwards stay eager, and the first one takes seconds
            with torch.inference_mode():
                self._graphs = record_steps(
                    self._prepare_step, self._step, recorder or CudaRecorder(), sizes=bucket_sizes(config.max_rows),
                    num_children=self._num_children, page_size=self.page_size, max_length=self.max_length, device=loaded.device,
                )  # fmt: skip

    @torch.inference_mode()
    def forward(self, batch: Batch, num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """See DraftEngine.forward. Ties go to the lower token id."""
        num_outputs = int(batch.num_outputs.sum())
        if not len(batch):
            return _no_outputs(num_children)
        if self._graphs is not None and self._graphs.takes(len(batch.token_ids), num_children):
            return self._graphs.forward(batch, num_children)
        common = self._lay_out(batch)
        with self._context(common, self._build(common)):
            hidden = self._model(input_ids=self._tensor(batch.token_ids), positions=common.positions)
            if num_outputs == 0:
                return _no_outputs(num_children)
            if num_outputs < common.num_actual_tokens:
                hidden = hidden[self._tensor(batch.output_indices)]
            logits = self._model.compute_logits(hidden)
        if logits is None:
            return _no_outputs(num_children)  # of several ranks the first has them
        tokens, probs = top_branches(logits[:, : self.vocab_size], num_children, *self._ranking(batch))
        return tokens.cpu().numpy().astype(np.int32), probs.cpu().numpy()

    def _build(self, common: CommonAttentionMetadata, recording: bool = False) -> dict[str, Any]:
        """Attention metadata by layer."""
        metadata: dict[str, Any] = {}
        for builder, names in self._builders:
            built = builder.build_for_cudagraph_capture(common) if recording else builder.build(0, common)
            metadata.update(dict.fromkeys(names, built))
        return metadata

    def _context(self, common: CommonAttentionMetadata, metadata: dict[str, Any]) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = set_forward_context(
            metadata,
            self._vllm_config,
            num_tokens=common.num_actual_tokens,
            slot_mapping=dict.fromkeys(self._layer_names, common.slot_mapping),
        )
        return context

    def _prepare_step(self, inputs: StepInputs, recording: bool) -> None:
        """See StepGraphs. Other inputs of attention lie in buffers of the builders, which refresh them."""
        common = CommonAttentionMetadata(
            query_start_loc=inputs.query_start_loc,
            query_start_loc_cpu=inputs.query_start_loc_cpu,
            seq_lens=inputs.seq_lens,
            num_reqs=inputs.size,
            num_actual_tokens=inputs.size,
            max_query_len=1,
            max_seq_len=self.max_length if recording else int(inputs.seq_lens_cpu.max()),
            block_table_tensor=inputs.block_table,
            slot_mapping=inputs.slot_mapping,
            positions=inputs.positions,
            seq_lens_cpu_upper_bound=inputs.seq_lens_cpu,
        )
        self._prepared = common, self._build(common, recording)

    def _step(self, inputs: StepInputs, sampled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """See StepGraphs. A replay runs none of this Python."""
        with self._context(*self._prepared):
            hidden = self._model(input_ids=inputs.input_ids, positions=inputs.positions)
            logits = self._model.compute_logits(hidden)
        noise, support = (inputs.noise, inputs.support) if sampled else (None, None)
        return top_branches(logits[:, : self.vocab_size], self._num_children, inputs.temperatures, noise, support)

    @torch.inference_mode()
    def copy_slots(self, triples: Sequence[tuple[int, int, int]]) -> None:
        """See DraftEngine.copy_slots."""
        fork_pages(self._caches, triples, page_size=self.page_size, slot_dim=self._slot_dim)

    def _lay_out(self, batch: Batch) -> CommonAttentionMetadata:
        """Positions and slots are int64 [tokens]."""
        lengths = np.diff(batch.query_start)
        seq_lens = batch.starts + lengths
        return CommonAttentionMetadata(
            query_start_loc=self._tensor(batch.query_start),
            query_start_loc_cpu=torch.from_numpy(batch.query_start),
            seq_lens=self._tensor(seq_lens),
            num_reqs=len(batch),
            num_actual_tokens=len(batch.token_ids),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=self._tensor(batch.pages),
            slot_mapping=self._tensor(batch.slot_mapping(self.page_size)),
            positions=self._tensor(batch.positions),
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
        )

    def _ranking(self, batch: Batch) -> tuple[torch.Tensor | None, Noise | None, Support | None]:
        """How `top_branches` ranks the outputs. Temperatures: float32 [outputs], or None if all are 1."""
        temperatures = noise = support = None
        if not ((batch.temperatures == 0.0) | (batch.temperatures == 1.0)).all():
            values = np.where(batch.temperatures == 0.0, np.float32(1.0), batch.temperatures)
            temperatures = self._tensor(np.repeat(values, batch.num_outputs))
        if batch.is_sampled:

            def column(name: str) -> torch.Tensor:
                return self._tensor(np.repeat(batch.sampling[name], batch.num_outputs))

            noise = Noise(column("seed"), self._tensor(batch.output_positions), column("noise_scale"))
            if batch.is_filtered:
                support = Support(*map(column, Support._fields))
        return temperatures, noise, support

    def _tensor(self, array: npt.NDArray[Any]) -> torch.Tensor:
        # The array may change afterwards: from memory that is not pinned CUDA takes what it copies before it returns.
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _no_outputs(num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    return np.empty((0, num_children), dtype=np.int32), np.empty((0, num_children), dtype=np.float32)


def _merge(caches: list[torch.Tensor]) -> list[torch.Tensor]:
    """One view [pages, heads, slots, content, layers] of all layers, if they lie evenly spaced in memory."""
    kinds = {(cache.untyped_storage().data_ptr(), cache.shape, cache.stride(), cache.dtype) for cache in caches}
    steps = {after.storage_offset() - before.storage_offset() for before, after in pairwise(caches)}
    if len(kinds) != 1 or len(steps) != 1:
        return caches
    first = caches[0]
    return [first.as_strided((*first.shape, len(caches)), (*first.stride(), steps.pop()), first.storage_offset())]
