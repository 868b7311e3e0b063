"""Pages, frontier and kernels together, without vLLM: a small paged Llama in plain torch, random weights, float32.

The same rows go to an engine on the kernels (on the GPU where there is one) and to one on the references on the CPU. Every
answer must be the same, and that of a forward of the whole text without a cache: what pages hold after forks and commits is
what the text says. On a GPU thousands of rounds, under the interpreter a few. Once more with forwards of few tokens
recorded, on a GPU as CUDA graphs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from double_kernels.fork_pages import fork_pages_reference
from double_kernels.noise import Noise, gumbel_noise
from double_kernels.support import Support
from double_kernels.top_branches import top_branches_reference
from double_kernels.triton_fork_pages import fork_pages_triton
from double_kernels.triton_top_branches import top_branches_triton

from tests.draft_view import check_integrity, trees
from tests.fakes.engine import count_outputs, rows_of
from vllm_double.draft.engine.base import SAMPLING_DTYPE, Batch
from vllm_double.draft.engine.cuda_graphs import CudaRecorder, StepGraphs, StepInputs, bucket_sizes, record_steps
from vllm_double.draft.frontier import Frontier, FrontierLimits
from vllm_double.transport.messages import Admit, Commit, Release

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_ROUNDS = 3000 if DEVICE == "cuda" else 10
NUM_CHILDREN = 6
FIELDS = SAMPLING_DTYPE.names or ()
VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 67, 32, 4, 2, 8, 2
PAGE_SIZE, NUM_PAGES, MAX_LENGTH = 4, 96, 80
# float32 sums in another order, through two layers and a softmax; also how close two probabilities are that may change places.
TOLERANCE = 2e-5


class Llama:
    """RMS norms, rotary positions, grouped queries, SwiGLU; keys and values as [layers, pages, 2, slots, heads, dim]."""

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def weights(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device)

        self.embedding, self.head = 2 * weights(VOCAB, HIDDEN), 3 * weights(VOCAB, HIDDEN)
        sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM, "gate": 48, "up": 48}
        self.layers = [
            {name: weights(size, HIDDEN) for name, size in sizes.items()}
            | {"o": weights(HIDDEN, HEADS * HEAD_DIM), "down": weights(HIDDEN, 48)}
            for _ in range(LAYERS)
        ]
        # Garbage that would show in every answer if an unwritten slot were read.
        self.cache = torch.full((LAYERS, NUM_PAGES, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM), 1e3, device=device)

    def whole(self, text: Sequence[int]) -> torch.Tensor:
        """Logits [len(text), vocab] without a cache."""
        device = self.cache.device
        positions = torch.arange(len(text), device=device)
        return self._run(torch.tensor(text, device=device), positions, lambda layer, q, k, v: _attend(q, k, v, positions))

    def paged(self, batch: Batch) -> torch.Tensor:
        """Logits [tokens, vocab]."""

        def tensor(values: npt.NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(values).to(self.cache.device)

        slots, block_table, positions = tensor(batch.slot_mapping(PAGE_SIZE)), tensor(batch.pages), tensor(batch.positions)
        starts, lengths = batch.query_start.tolist(), (batch.starts + np.diff(batch.query_start)).tolist()

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache = self.cache[layer]
            cache[slots // PAGE_SIZE, 0, slots % PAGE_SIZE] = k
            cache[slots // PAGE_SIZE, 1, slots % PAGE_SIZE] = v
            outputs = torch.zeros_like(q)
            for request, length in enumerate(lengths):
                rows = slice(starts[request], starts[request + 1])
                pages = cache[block_table[request, : -(-length // PAGE_SIZE)].long()]
                keys, values = (pages[:, part].flatten(0, 1)[:length] for part in (0, 1))
                outputs[rows] = _attend(q[rows], keys, values, positions[rows])
            return outputs

        return self._run(tensor(batch.token_ids), positions, attend)

    def decode(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [size, vocab] of rows of one token; nothing waits for the device, or depends on values on the host."""
        slots = inputs.slot_mapping
        places = torch.arange(inputs.block_table.shape[1] * PAGE_SIZE, device=slots.device)
        is_behind = places >= inputs.seq_lens[:, None, None]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache = self.cache[layer]
            cache[slots // PAGE_SIZE, 0, slots % PAGE_SIZE] = k
            cache[slots // PAGE_SIZE, 1, slots % PAGE_SIZE] = v
            pages = cache[inputs.block_table.long()].repeat_interleave(HEADS // KV_HEADS, dim=4)
            keys, values = (pages[:, :, part].flatten(1, 2) for part in (0, 1))
            scores = torch.einsum("rhd,rkhd->rhk", q, keys) / HEAD_DIM**0.5
            return torch.einsum("rhk,rkhd->rhd", scores.masked_fill(is_behind, -torch.inf).softmax(-1), values)

        return self._run(inputs.input_ids, inputs.positions, attend)

    def _run(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        hidden = self.embedding[input_ids]
        for index, layer in enumerate(self.layers):
            x = _norm(hidden)
            q, k, v = ((x @ layer[name].T).unflatten(-1, (-1, HEAD_DIM)) for name in "qkv")
            attended = attend(index, _rotate(q, positions), _rotate(k, positions), v)
            hidden = hidden + attended.flatten(1) @ layer["o"].T
            x = _norm(hidden)
            hidden = hidden + (torch.nn.functional.silu(x @ layer["gate"].T) * (x @ layer["up"].T)) @ layer["down"].T
        return _norm(hidden) @ self.head.T


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary positions of [tokens, heads, dim]."""
    frequencies = 100.0 ** (-torch.arange(0, HEAD_DIM, 2, device=x.device) / HEAD_DIM)
    angles = (positions[:, None] * frequencies)[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Causal attention of q [queries, heads, dim] at these positions on k, v [tokens, kv heads, dim] from 0 on."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
    hidden_from = torch.arange(len(k), device=q.device)[None, :] > positions[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden_from, -torch.inf).softmax(-1), v)


class LlamaEngine:
    """DraftEngine on the paged Llama and one implementation of the ops."""

    page_size, num_pages, max_length, vocab_size = PAGE_SIZE, NUM_PAGES, MAX_LENGTH, VOCAB

    def __init__(self, device: str, fork: Callable[..., None], top: Callable[..., Any]) -> None:
        self.llama = Llama(device)
        self._device, self._fork, self._top = device, fork, top
        self._graphs: StepGraphs | None = None
        self.num_replays = 0

    def record(self, max_tokens: int) -> None:
        """From now on forwards of so many tokens are replayed, where there is no GPU run again on the same buffers."""

        def step(inputs: StepInputs, sampled: bool) -> tuple[torch.Tensor, torch.Tensor]:
            noise, support = (inputs.noise, inputs.support) if sampled else (None, None)
            tokens, probs = self._top(self.llama.decode(inputs), NUM_CHILDREN, inputs.temperatures, noise, support)
            return tokens, probs

        self._graphs = record_steps(
            lambda inputs, recording: None, step, CudaRecorder() if self._device == "cuda" else lambda step: step,
            sizes=bucket_sizes(max_tokens) if self._device == "cuda" else [4, max_tokens], num_children=NUM_CHILDREN,
            page_size=PAGE_SIZE, max_length=MAX_LENGTH, device=torch.device(self._device),
        )  # fmt: skip
        assert self._graphs is not None, "could not be recorded"

    def forward(self, batch: Batch, num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        if self._graphs is not None and self._graphs.takes(len(batch.token_ids), num_children):
            self.num_replays += 1
            return self._graphs.forward(batch, num_children)
        logits = self.llama.paged(batch)[batch.output_indices]
        temperatures = np.repeat(np.where(batch.temperatures > 0, batch.temperatures, 1), batch.num_outputs)
        noise, support = None, None
        if batch.is_sampled:
            of_outputs = {name: torch.from_numpy(batch.output_sampling[name].copy()).to(self._device) for name in FIELDS}
            positions = self._tensor(batch.output_positions, np.int64)
            noise = Noise(of_outputs["seed"], positions, of_outputs["noise_scale"])
            support = Support(of_outputs["top_k"], of_outputs["top_p"], of_outputs["min_p"])
        tokens, probs = self._top(logits, num_children, self._tensor(temperatures, np.float32), noise, support)
        return tokens.cpu().numpy().astype(np.int32), probs.cpu().numpy()

    def copy_slots(self, triples: Sequence[tuple[int, int, int]]) -> None:
        self._fork(list(self.llama.cache.unbind(0)), triples, slot_dim=2)

    def _tensor(self, values: Any, dtype: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=dtype)).to(self._device)


class TwinEngine(LlamaEngine):
    """The kernels' engine; its answers are compared with the references' engine and with the Llama without a cache."""

    def __init__(self) -> None:
        super().__init__(DEVICE, fork_pages_triton, top_branches_triton)
        self._twin = LlamaEngine("cpu", fork_pages_reference, top_branches_reference)
        self._texts = np.full((NUM_PAGES, PAGE_SIZE), -1)  # which token each slot holds
        self.num_outputs = 0
        self.num_sampled = 0

    def forward(self, batch: Batch, num_children: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        self.num_outputs += count_outputs(batch, self)
        found, expected = super().forward(batch, num_children), self._twin.forward(batch, num_children)
        same_answers(batch, found, expected)
        self._check_texts(batch, found)
        self.num_sampled += int((batch.output_sampling["noise_scale"] > 0).sum())
        return found

    def _check_texts(self, batch: Batch, found: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]) -> None:
        tokens, probs = [], []
        for row in rows_of(batch):
            for position, token in enumerate(row.tokens, start=row.start):
                self._texts[row.pages[position // PAGE_SIZE], position % PAGE_SIZE] = token
            length = row.start + len(row.tokens)
            text = self._texts[list(row.pages)].flatten()[:length].tolist()
            logits = self._twin.llama.whole(text)[length - row.num_outputs :] / (row.temperature or 1.0)
            all_probs = logits.softmax(-1)
            is_kept = all_probs >= row.min_p * all_probs.amax(-1, keepdim=True)
            if row.top_k:
                is_kept &= logits >= logits.topk(row.top_k).values[:, -1:]
            positions = np.arange(length - row.num_outputs, length)[:, None]
            noise = torch.from_numpy(gumbel_noise(np.array([[row.seed]]), positions, np.arange(VOCAB)))
            scores = torch.where(is_kept, all_probs.log() + row.noise_scale * noise, -torch.inf)
            best = scores.sort(dim=-1, descending=True, stable=True).indices[:, : found[0].shape[1]]
            tokens.append(best.numpy())
            probs.append(torch.where(is_kept, all_probs, 0.0).gather(1, best).numpy())
        same_answers(batch, found, (np.concatenate(tokens), np.concatenate(probs)))

    def copy_slots(self, triples: Sequence[tuple[int, int, int]]) -> None:
        super().copy_slots(triples)
        self._twin.copy_slots(triples)
        for source, destination, used in triples:
            self._texts[destination, :used] = self._texts[source, :used]


def same_answers(batch: Batch, found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """The same scores and probabilities in order, and the same tokens unless two have the same score."""
    sampling, positions = batch.output_sampling, batch.output_positions[:, None]

    def scores(tokens: Any, probs: Any) -> Any:
        noise = gumbel_noise(sampling["seed"][:, None], positions, tokens)
        with np.errstate(divide="ignore"):
            return np.log(probs) + sampling["noise_scale"][:, None] * noise

    # A tolerance of probabilities is one of their logarithms.
    found_scores, expected_scores = scores(*found), scores(*expected)
    np.testing.assert_allclose(found_scores, expected_scores, rtol=0, atol=2 * TOLERANCE)
    same = found[0] == expected[0]
    np.testing.assert_allclose(found[1][same], expected[1][same], rtol=TOLERANCE)
    for line, place in np.argwhere(~same):
        others = np.delete(expected_scores[line], place)
        last = place == expected[1].shape[1] - 1  # its equal may be the first that is not listed
        is_equal = np.isclose(others, expected_scores[line, place], rtol=0, atol=2 * TOLERANCE)
        assert last or is_equal.any(), f"token {place} of output {line}"


@pytest.fixture(autouse=True)
def _exact_arithmetic() -> None:
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.timeout(1800)
@torch.inference_mode()
def test_drafting_on_the_kernels_is_that_on_the_references(is_recorded: bool) -> None:
    rng = random.Random(0)
    engine = TwinEngine()
    if is_recorded:
        engine.record(max_tokens=12)
    frontier = Frontier(engine, FrontierLimits(6, nodes_per_iteration=6, children_per_node=NUM_CHILDREN, prefill_tokens=16))
    texts: dict[int, list[int]] = {}
    no_chain = np.empty(0, np.int32), np.empty(0, np.float32)
    num_copies = 0
    for number in range(NUM_ROUNDS):
        if len(texts) < 3:
            text = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 24))]
            texts[number] = text
            temperature = rng.choice([0.0, 1.3])  # vLLM gives greedy requests no filters
            filters = {"top_k": rng.choice([0, 4]), "min_p": rng.choice([0.0, 0.05])} if temperature else {}
            seed = rng.randrange(-(1 << 63), 1 << 63)
            tokens = np.array(text, np.int32)
            frontier.apply(Admit(number, len(text), tokens, temperature, MAX_LENGTH, (), "", seed=seed, **filters))
        batch = frontier.select()
        if len(batch):
            engine.copy_slots(frontier.tail_copies)
            num_copies += len(frontier.tail_copies)
            frontier.expand(*engine.forward(batch, NUM_CHILDREN))
        if number % 2:
            continue  # a target step takes as long as two draft forwards
        for handle, text in list(texts.items()):
            request = trees(frontier).get(handle)
            if request is None or len(text) > MAX_LENGTH - 12:
                frontier.apply(Release(handle))
                del texts[handle]
                continue
            node, accepted = request.root, []
            for _ in range(rng.randint(1, 3)):
                drafted = node.alternatives if node is not None else []
                token = drafted[0] if drafted and rng.random() < 0.8 else rng.randrange(VOCAB)
                node = node.children.get(token) if node is not None else None
                accepted.append(token)
            frontier.apply(Commit(handle, len(text), np.array(accepted, np.int32), *no_chain))
            text += accepted
        check_integrity(frontier)
    assert engine.num_outputs > 4 * NUM_ROUNDS
    assert NUM_ROUNDS / 2 < engine.num_sampled < engine.num_outputs
    assert num_copies > NUM_ROUNDS / 4
    assert (engine.num_replays > NUM_ROUNDS / 2) == is_recorded
