"""Which draft model an engine loads, and how much it may keep. Imports nothing heavy: every process of ours may read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["EngineConfig"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Which draft model, where it runs, and how much it may keep.

    model, revision, quantization, trust_remote_code, max_model_len, seed: as in vLLM; None is the model's own.
    loading: further arguments of vLLM's EngineArgs, which say how weights and configuration are found and read.
    dtype: as in vLLM, whose 'auto' is 16 bits for a float32 model, too; but float32 on a CPU without instructions for them.
    longest_text: of the target; a draft model that could read more is not given room for it.
    device: 'cpu' or 'cuda:N'; vLLM must be built for it.
    num_threads: threads of the operators on a CPU. OMP_NUM_THREADS and the affinity of the process are its
        starter's.
    page_size: tokens in a page; None is the smallest that the model's attention backend takes, which makes
        forks cheap.
    num_pages: pages of the key/value cache; None is what kv_cache_bytes has room for.
    max_num_seqs, max_num_batched_tokens: rows and tokens of one forward at most; backends size their buffers by them.
    vocab_size: of the target; higher token ids are never drafted. None is the draft's own.
    tensor_parallel_size: devices that share the model; this engine drives one of them, number ``rank``.
    num_children: children per token that recorded forwards find; forwards for more are not replayed.
    enforce_eager: no CUDA graphs. On a CPU or with several ranks there are none in any case; the model is never compiled.
    rendezvous: new file through which several ranks find each other.
    """

    model: str
    revision: str | None = None
    code_revision: str | None = None
    quantization: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    longest_text: int | None = None
    device: str = "cpu"
    num_threads: int = 1
    page_size: int | None = None
    num_pages: int | None = None
    kv_cache_bytes: int = 256 << 20
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    vocab_size: int | None = None
    tensor_parallel_size: int = 1
    rank: int = 0
    rendezvous: str = ""
    trust_remote_code: bool = False
    seed: int = 0
    loading: dict[str, Any] = field(default_factory=dict)
    num_children: int = 32
    enforce_eager: bool = False

    @property
    def max_rows(self) -> int:
        """Of one token each, in one forward."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def eager_because(self) -> str:
        """Why no CUDA graphs are to be recorded; empty if they are."""
        if not self.device.startswith("cuda"):
            return f"there are no CUDA graphs on {self.device}"
        if self.enforce_eager:
            return '"enforce_eager" is set'
        # Each rank would have to record and replay its collective operations in step with the others: nobody has tried.
        return "several devices share the model" if self.tensor_parallel_size > 1 else ""
