"""Draft steps as CUDA graphs: shapes in buckets, inputs in buffers that stay where they are, one copy there and one back.

A recorded step reads one query token per row. A row of several tokens becomes as many rows of one token on the same pages: an
attention layer writes all keys and values of a forward before it reads any, so a token sees those in front of it. All forwards
of few tokens are thus of one kind, which every attention backend with CUDA graphs can replay.

The recorder is an argument: tests without a GPU run the same operators again.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from double_kernels import Noise, Support

from vllm_double.draft.engine.base import Batch, Row

__all__ = ["CudaRecorder", "Recorder", "StepGraphs", "StepInputs", "bucket_sizes", "record_steps"]

logger = logging.getLogger("vllm.double")  # in a draft worker vLLM's handlers write what the server's log repeats

_MAX_TOKENS = 256  # beyond, a forward's kernels take longer than their launches
_ALIGNMENT = 64  # bytes; kernels are compiled for aligned addresses
_REPLAY_TOLERANCE = 0.02  # of a probability: the same kernels, which may split a sum otherwise in 16 bits

_BUFFERS: dict[str, tuple[torch.dtype, float]] = {
    "input_ids": (torch.int64, 0), "positions": (torch.int64, 0), "slot_mapping": (torch.int64, 0),
    "seq_lens": (torch.int32, 1), "temperatures": (torch.float32, 1.0), "seed": (torch.int64, 0),
    "noise_scale": (torch.float32, 0.0), "top_k": (torch.int32, 0), "top_p": (torch.float32, 1.0),
    "min_p": (torch.float32, 0.0), "block_table": (torch.int32, 0),
}  # fmt: skip
"""Inputs that change from step to step: dtype, and value in the padding of a bucket."""

# Runs a step and returns a function that repeats it, with its result in the same tensor each time.
Recorder = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Buffers of one bucket, at addresses that never change: ``size`` rows of one query token.

    On the device: input_ids, positions, slot_mapping int64 [size]; seq_lens int32 [size], from 1 on; temperatures float32
    [size], positive; noise, support: as `top_branches` takes them; block_table int32 [size, pages], its entries 0 behind a
    row's pages; query_start_loc int32 [size + 1]. On the host: seq_lens_cpu, query_start_loc_cpu.
    """

    size: int
    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor
    temperatures: torch.Tensor
    noise: Noise
    support: Support
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens_cpu: torch.Tensor
    query_start_loc_cpu: torch.Tensor


def bucket_sizes(limit: int) -> list[int]:
    """Powers of two, and the limit itself: the rows of one forward at most, as far as recording them pays."""
    limit = min(limit, _MAX_TOKENS)
    return sorted({limit, *(1 << power for power in range(limit.bit_length()))})


class CudaRecorder:
    """Records with torch.cuda.CUDAGraph. Recordings share their memory: one result at a time, largest recording first."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


class StepGraphs:
    """Recorded forwards of few tokens.

    The padding of a bucket is token 0 at position 0 of page 0, which belongs to nobody: it is written there and reads itself.
    """

    def __init__(
        self, prepare: Callable[[StepInputs, bool], None],
        step: Callable[[StepInputs, bool], tuple[torch.Tensor, torch.Tensor]], recorder: Recorder, *,
        sizes: Sequence[int], num_children: int, page_size: int, max_length: int, device: torch.device,
    ) -> None:  # fmt: skip
        """Records at once. Raises what recording raises, and RuntimeError if a replay differs from the step.

        prepare: is called when the inputs are in place, before each run, recording (then with True) and replay of a step; it
            does the host's part.
        step: the forward on these buffers, tokens int64 and probabilities float32 [size, num_children]. It may not wait for
            the device. It is recorded twice, without noise and with noise (then with True).
        max_length: positions that the model takes.
        """
        self.num_children = num_children
        self._prepare, self._step = prepare, step
        self._page_size = page_size
        buckets = []
        for size in sorted(sizes, reverse=True):  # the largest takes the memory, which the others share
            bucket = _Bucket(size, num_children, -(-max_length // page_size), device)
            self._record(bucket, recorder, probe_position=min(page_size, max_length) - 1)
            buckets.append(bucket)
        self._buckets = buckets[::-1]

    def _record(self, bucket: _Bucket, recorder: Recorder, probe_position: int) -> None:
        inputs = bucket.inputs
        self._stage(bucket, Batch.of([]), True)
        for sampled in (False, True):
            self._packed_step(inputs, sampled)  # kernels are compiled, libraries allocate; prepared buffers may change
            self._stage(bucket, Batch.of([]), True)
            bucket.replays[sampled] = recorder(functools.partial(self._packed_step, inputs, sampled))
            # A recording that kept values instead of addresses would draft nonsense without a word.
            row = Row([0], probe_position, [1], 1, 2.0, seed=7, noise_scale=float(sampled))  # unlike padding
            probe = Batch.of([row] * inputs.size)
            self._stage(bucket, probe, False)
            expected = self._packed_step(inputs, sampled).cpu()
            self._stage(bucket, probe, False)
            found = bucket.replays[sampled]().cpu()
            same_tokens = (found[0] == expected[0]).float().mean()
            differences = (found[1].view(torch.float32) - expected[1].view(torch.float32)).abs()
            if same_tokens < 0.5 or differences.nan_to_num(0.0).max() > _REPLAY_TOLERANCE:
                raise RuntimeError(f"a replay of {inputs.size} rows differs from the model")

    def _stage(self, bucket: _Bucket, batch: Batch, recording: bool) -> None:
        """Everything before a run of the step."""
        bucket.fill(batch, self._page_size)
        self._prepare(bucket.inputs, recording)

    def _packed_step(self, inputs: StepInputs, sampled: bool) -> torch.Tensor:
        """int32 [2, size, num_children]: tokens, and the bits of their probabilities; so that one copy brings both."""
        tokens, probs = self._step(inputs, sampled)
        return torch.stack((tokens.to(torch.int32), probs.view(torch.int32)))

    def takes(self, num_tokens: int, num_children: int) -> bool:
        """Whether `forward` can be asked for so many tokens of all rows together, and so many children."""
        return num_tokens <= self._buckets[-1].inputs.size and num_children <= self.num_children

    def forward(self, batch: Batch, num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """See DraftEngine.forward; the batch has been checked. The host waits once, for the answer."""
        bucket = next(bucket for bucket in self._buckets if len(batch.token_ids) <= bucket.inputs.size)
        self._stage(bucket, batch, False)
        bucket.answer.copy_(bucket.replays[batch.is_sampled]())
        lines = bucket.answer.numpy()[:, batch.output_indices, :num_children]  # a copy
        return lines[0], lines[1].view(np.float32)


def record_steps(*args: Any, **settings: Any) -> StepGraphs | None:
    """StepGraphs of the same arguments; None if recording fails, which is logged: forwards stay eager."""
    try:
        graphs = StepGraphs(*args, **settings)
    except Exception as error:  # whatever a model or a backend does that cannot be recorded
        reason = str(error).partition("\n")[0]
        logger.warning("The draft runs eagerly: its steps cannot be recorded (%s: %s).", type(error).__name__, reason)
        return None
    logger.info("Draft forwards of up to %d tokens are replayed.", max(settings["sizes"]))
    return graphs


class _Bucket:
    """Buffers for ``size`` tokens, a recording that reads them, and memory for its answer on the host."""

    def __init__(self, size: int, num_children: int, num_row_pages: int, device: torch.device) -> None:
        # All in one piece of memory, so that one copy brings it to the device.
        spans: dict[str, tuple[slice, torch.dtype, tuple[int, ...]]] = {}
        begin = 0
        for name, (dtype, _) in _BUFFERS.items():
            shape = (size, num_row_pages) if name == "block_table" else (size,)
            end = begin + dtype.itemsize * math.prod(shape)
            spans[name] = slice(begin, end), dtype, shape
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        # From pinned memory the device copies by itself; before `fill` writes there again, an answer has been waited for.
        pinned = device.type == "cuda"
        self._host = torch.zeros(begin, dtype=torch.uint8, pin_memory=pinned)
        self._device = torch.zeros(begin, dtype=torch.uint8, device=device)

        def views(buffer: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: buffer[span].view(dtype).view(shape) for name, (span, dtype, shape) in spans.items()}

        host, on_device = views(self._host), views(self._device)
        support = Support(*(on_device.pop(name) for name in Support._fields))
        noise = Noise(on_device.pop("seed"), on_device["positions"], on_device.pop("noise_scale"))
        query_start_loc = torch.arange(size + 1, dtype=torch.int32)
        self.inputs = StepInputs(
            size=size, query_start_loc=query_start_loc.to(device), seq_lens_cpu=host["seq_lens"],
            query_start_loc_cpu=query_start_loc, noise=noise, support=support, **on_device,
        )  # fmt: skip
        self._arrays = {name: tensor.numpy() for name, tensor in host.items()}
        self.answer = torch.zeros((2, size, num_children), dtype=torch.int32, pin_memory=pinned)
        self.replays: dict[bool, Callable[[], torch.Tensor]] = {}  # without and with noise

    def fill(self, batch: Batch, page_size: int) -> None:
        """Put the batch's tokens in, one a row, and padding behind them."""
        num_tokens, positions = len(batch.token_ids), batch.positions
        row = np.repeat(np.arange(len(batch)), np.diff(batch.query_start))
        for name, (_, padding) in _BUFFERS.items():
            self._arrays[name][:] = padding
        pages = batch.pages[row, : self._arrays["block_table"].shape[1]]
        self._arrays["block_table"][:num_tokens, : pages.shape[1]] = pages
        sampling = batch.sampling[row]
        for name, values in (
            ("input_ids", batch.token_ids),
            ("positions", positions),
            ("slot_mapping", batch.slot_mapping(page_size)),
            ("seq_lens", positions + 1),
            ("temperatures", np.where(sampling["temperature"] > 0, sampling["temperature"], 1.0)),
            *((name, sampling[name]) for name in ("seed", "noise_scale", *Support._fields)),
        ):
            self._arrays[name][:num_tokens] = values
        self._device.copy_(self._host, non_blocking=True)
