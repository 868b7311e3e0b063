"""A Llama for vLLM whose logits a script decides where it knows the context; everything else is Llama's.

Drafts, whoever makes them, are verified against it as against any target: what it says is a function of a
request's own tokens, however these are cut into forwards, cached or rejected. It reads the script on the host in
every forward: for the CPU, or a GPU without CUDA graphs.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaForCausalLM

from benchmarks.scripted.script import NOTHING, ROOT, Script

__all__ = ["ScriptedLlamaForCausalLM"]

CERTAIN = 1e4
"""Added to the scripted token's logit: its probability is 1 in float32 at any temperature in use."""


class ScriptedLlamaForCausalLM(LlamaForCausalLM):
    """Runs the whole Llama, then overrules it.

    ``_node_at_slot`` has for every slot of the paged KV cache the script's node of the context that ends there,
    so that a forward goes on from the token before its first one. What the script says travels to
    ``compute_logits``, which sees some rows only, as the bits of additional hidden columns.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """The script lies beside the model's config.json."""
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._script = Script.read(Path(vllm_config.model_config.model) / "script.jsonl")
        self._cache = vllm_config.cache_config
        self._node_at_slot = np.zeros(1, np.int32)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Hidden states and what follows by the script: [tokens, hidden size + 4 / bytes of the dtype]."""
        hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        following = np.full(len(hidden), NOTHING, np.int32)
        metadata = get_forward_context().attn_metadata
        if metadata is not None:
            self._read(following, input_ids, positions, next(iter(metadata.values())))
        columns = torch.from_numpy(following).to(hidden.device).view(hidden.dtype).view(len(hidden), -1)
        return torch.cat([hidden, columns], dim=1)

    def _read(self, following: np.ndarray, input_ids: Tensor, positions: Tensor, metadata: Any) -> None:
        """Sets ``following`` for every scheduled token, and the node at its slot."""
        starts = metadata.query_start_loc.tolist()
        tokens, slots = input_ids[: starts[-1]].tolist(), metadata.slot_mapping[: starts[-1]].cpu().numpy()
        if slots.size and slots.max() >= len(self._node_at_slot):
            self._node_at_slot = np.pad(self._node_at_slot, (0, 2 * int(slots.max()) + 1))
        rows = [
            (int(positions[start]) - 1, row, start, end) for row, (start, end) in enumerate(pairwise(starts)) if end > start
        ]
        # By position: a request may go on from a cached block that another one fills in this very forward.
        for before, row, start, end in sorted(rows):
            node = ROOT if before < 0 else int(self._node_at_slot[self._slot(metadata, row, before)])
            nodes = self._script.walk(node, tokens[start:end])
            self._node_at_slot[slots[start:end]] = nodes
            following[start:end] = [self._script.following[node] for node in nodes]

    def _slot(self, metadata: Any, row: int, position: int) -> int:
        size = int(self._cache.block_size)
        return int(metadata.block_table[row, position // size]) * size + position % size

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Llama's logits, with certainty where the script goes on. [rows, vocabulary]"""
        size = self.config.hidden_size
        logits: Tensor = super().compute_logits(hidden_states[:, :size].contiguous())
        following = hidden_states[:, size:].contiguous().view(torch.int32).flatten().long()
        # vLLM's dry runs pass random numbers for hidden states.
        known = ((following >= 0) & (following < logits.shape[1])).nonzero().flatten()
        logits[known, following[known]] += CERTAIN
        return logits
