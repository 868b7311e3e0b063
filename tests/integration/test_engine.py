"""The vLLM draft engine against transformers: same model and text, however cut into forwards and pages.

Eagerly, and with forwards of few tokens as they are recorded on a GPU: on buffers that stay, filled up to the next bucket. A
CPU records nothing; there the step runs again on the same buffers.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_double.draft.engine.base import Batch, Row

transformers = pytest.importorskip("transformers")
pytest.importorskip("vllm")
pytestmark = pytest.mark.integration

NUM_CHILDREN = 5
MAX_RECORDED = 44  # tokens: some of the forwards below have more
PAGE_SIZE = 32
NUM_PAGES = 64
MAX_LENGTH = 256
VOCAB_SIZE = 97
# float32 sums in another order, through two layers and a softmax
PROB_TOLERANCE = 2e-5

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen3-tied": lambda: transformers.Qwen3Config(**SMALL, tie_word_embeddings=True),
    "gemma3-sliding-window": lambda: transformers.Gemma3TextConfig(
        **{**SMALL, "initializer_range": 0.1},
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def _run_again(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return step


def _serve(connection: Connection, path: str, is_recorded: bool) -> None:
    from vllm_double.draft.engine.vllm_engine import EngineConfig, VllmDraftEngine

    # As vLLM's, "auto" is 16 bits on a CPU that has instructions for them.
    sizes = {"num_pages": NUM_PAGES, "max_num_seqs": MAX_RECORDED, "num_children": NUM_CHILDREN}
    config = EngineConfig(model=path, dtype="float32", **sizes)
    engine = VllmDraftEngine(config, recorder=_run_again if is_recorded else None)
    assert (engine._graphs is not None) == is_recorded
    for cache in engine._caches:
        cache.fill_(1e3)
    sizes = (engine.page_size, engine.num_pages, engine.max_length, engine.vocab_size)
    connection.send(sizes)
    while (call := connection.recv()) is not None:
        name, args = call
        try:
            connection.send(getattr(engine, name)(*args))
        except ValueError as error:
            connection.send(error)


class RemoteEngine:
    """The engine in a process of its own, as vLLM keeps state in its process."""

    def __init__(self, path: str, is_recorded: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, path, is_recorded), daemon=True)
        self._process.start()
        theirs.close()
        self.page_size, self.num_pages, self.max_length, self.vocab_size = self._connection.recv()

    def _call(self, name: str, *args: Any) -> Any:
        self._connection.send((name, args))
        result = self._connection.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def forward(self, rows: Sequence[Row], num_children: int = NUM_CHILDREN) -> Any:
        return self._call("forward", Batch.of(rows), num_children)

    def copy_slots(self, triples: Sequence[tuple[int, int, int]]) -> None:
        self._call("copy_slots", list(triples))

    def close(self) -> None:
        self._connection.send(None)
        self._process.join(120)
        assert not self._process.is_alive(), "the engine's process did not end"


class World:
    """An engine, and transformers' logits for any text."""

    def __init__(self, engine: RemoteEngine, reference: Any) -> None:
        self.engine = engine
        self._reference = reference

    def logits(self, text: Sequence[int]) -> torch.Tensor:
        """float32 [len(text), vocab]"""
        with torch.inference_mode():
            return self._reference(torch.tensor([list(text)])).logits[0]

    def check(self, outputs: Any, texts: Sequence[Sequence[int]], temperature: float = 1.0) -> None:
        """Output i is the distribution after texts[i]."""
        tokens, probs = outputs
        assert tokens.dtype == np.int32
        assert probs.dtype == np.float32
        assert tokens.shape == probs.shape == (len(texts), NUM_CHILDREN)
        known: list[tuple[Sequence[int], torch.Tensor]] = []
        for index in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
            text = texts[index]
            logits = next((found for longer, found in known if longer[: len(text)] == text), None)
            if logits is None:
                logits = self.logits(text)
                known.append((text, logits))
            expected = torch.softmax(logits[len(text) - 1] / temperature, dim=-1)
            best = expected.topk(NUM_CHILDREN)
            np.testing.assert_allclose(probs[index], best.values, atol=PROB_TOLERANCE, err_msg=f"output {index}")
            np.testing.assert_allclose(expected[tokens[index]], best.values, atol=PROB_TOLERANCE, err_msg=f"output {index}")

    def write(self, pages: Sequence[int], text: Sequence[int], start: int = 0) -> None:
        self.engine.forward([_row(pages, start, text[start:], 0)])


def _row(pages: Sequence[int], start: int, tokens: Sequence[int], num_outputs: int = 1, temperature: float = 0.0) -> Row:
    return Row(
        pages=tuple(pages),
        start=start,
        tokens=tuple(tokens),
        num_outputs=num_outputs,
        temperature=temperature,
    )


def _text(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB_SIZE, length)]


def _build(name: str, directory: Path, is_recorded: bool = False) -> World:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.save_pretrained(directory)
    return World(RemoteEngine(str(directory), is_recorded), model)


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    built = _build("llama", tmp_path_factory.mktemp("llama"))
    yield built
    built.engine.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    built = _build("llama", tmp_path_factory.mktemp("llama"), is_recorded=True)
    yield built
    built.engine.close()


@pytest.fixture(params=["eager", "recorded"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found


def test_sizes_are_those_of_the_model_and_the_backend(world: World) -> None:
    engine = world.engine
    assert engine.page_size == PAGE_SIZE
    assert engine.num_pages == NUM_PAGES
    assert engine.max_length == MAX_LENGTH
    assert engine.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize("chunk", [1, 7, 31, 32, 33, 100])
def test_chunked_prefill_differs_from_one_forward(world: World, chunk: int) -> None:
    text = _text(1, 100)
    pages = [9, 3, 17, 5]
    for start in range(0, len(text), chunk):
        tokens = text[start : start + chunk]
        outputs = world.engine.forward([_row(pages, start, tokens, len(tokens))])
        world.check(outputs, [text[: start + i + 1] for i in range(len(tokens))])


def test_rows_of_a_ragged_batch_disturb_each_other(world: World) -> None:
    texts = [_text(10 + i, length) for i, length in enumerate((70, 33, 64, 1, 128, 40))]
    cached = (69, 25, 32, 0, 64, 0)  # one token, a chain, a page, a first token, a chunk, a whole prompt
    num_outputs = (1, 8, 32, 1, 1, 0)
    tables = [[3 * i + 1 + p for p in range(4)] for i in (0, 2, 4, 6, 8, 10)]
    for table, text, start in zip(tables, texts, cached, strict=True):
        if start:
            world.write(table, text[:start])
    outputs = world.engine.forward(
        [_row(table, start, text[start:], n) for table, start, text, n in zip(tables, cached, texts, num_outputs, strict=True)]
    )
    wanted = [text[: len(text) - back] for text, n in zip(texts, num_outputs, strict=True) for back in reversed(range(n))]
    world.check(outputs, wanted)


def test_greedy_decoding_leaves_the_reference_text(world: World) -> None:
    text = _text(2, 20)
    pages = [40, 2, 31]
    tokens, _ = world.engine.forward([_row(pages, 0, text)])
    for _ in range(70):
        text.append(int(tokens[0, 0]))
        tokens, _ = world.engine.forward([_row(pages, len(text) - 1, text[-1:])])
    assert text[20:] == world.logits(text).argmax(-1)[19:-1].tolist()


@pytest.mark.parametrize("used", [1, 13, 31])
def test_fork_of_a_tail_page_confuses_the_branches(world: World, used: int) -> None:
    shared = _text(3, PAGE_SIZE + used)
    parent, child, sibling = [10, 11, 14, 17], [10, 12, 15, 18], [10, 13, 16, 19]
    world.write(parent, shared)
    world.engine.copy_slots([(11, 12, used), (11, 13, used)])
    branches = [_text(30 + i, 40) for i in range(3)]
    tables = (parent, child, sibling)
    for step in range(40):
        rows = [_row(t, len(shared) + step, [b[step]]) for t, b in zip(tables, branches, strict=True)]
        outputs = world.engine.forward(rows)
        if step in (0, 1, PAGE_SIZE - used, 39):
            world.check(outputs, [shared + branch[: step + 1] for branch in branches])


def test_copies_of_one_call_mix_up_pages(world: World) -> None:
    texts = [_text(50 + i, 20) for i in range(3)]
    world.engine.forward([_row([20 + i], 0, text, 0) for i, text in enumerate(texts)])
    world.engine.copy_slots([(20 + i, 25 + i, 20) for i in range(3)])
    world.engine.forward([_row([20 + i], 0, _text(60 + i, 20), 0) for i in range(3)])
    outputs = world.engine.forward([_row([25 + i], 20, [i]) for i in range(3)])
    world.check(outputs, [[*text, i] for i, text in enumerate(texts)])


@pytest.mark.parametrize("keep", [1, 31, 32, 33, 50])
def test_rewound_slots_are_seen_after_they_were_written_anew(world: World, keep: int) -> None:
    pages = [7, 8, 6]
    first = _text(4, 80)
    world.write(pages, first)
    second = first[:keep] + _text(5, 30)
    outputs = world.engine.forward([_row(pages, keep, second[keep:], 30)])
    world.check(outputs, [second[: keep + i + 1] for i in range(30)])


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
def test_temperature_of_a_row_is_not_its_own(world: World, temperature: float) -> None:
    text = _text(6, 12)
    outputs = world.engine.forward([_row([1], 0, text, 1, 0.7), _row([2], 0, text, 2, temperature)])
    world.check([part[:1] for part in outputs], [text], 0.7)
    world.check([part[1:] for part in outputs], [text[:-1], text], temperature or 1.0)


def test_forward_without_outputs_returns_lines(world: World) -> None:
    tokens, probs = world.engine.forward([_row([1], 0, _text(7, 9), 0)])
    assert tokens.shape == probs.shape == (0, NUM_CHILDREN)


def test_more_rows_than_ever_before_fail(world: World) -> None:
    texts = [_text(100 + i, 3) for i in range(40)]
    outputs = world.engine.forward([_row([1 + i], 0, text) for i, text in enumerate(texts)])
    world.check(outputs, texts)


def test_last_position_of_the_model_is_refused(world: World) -> None:
    text = _text(8, MAX_LENGTH)
    pages = list(range(20, 28))
    world.write(pages, text[:-1])
    world.check(world.engine.forward([_row(pages, MAX_LENGTH - 1, text[-1:])]), [text])


def test_recorded_steps_draft_other_tokens_than_eager_ones(eager: World, recorded: World) -> None:
    """Random forwards on the same pages, from one row of one token to more tokens than are recorded."""
    rng = np.random.default_rng(11)
    texts = [_text(200 + row, 150) for row in range(8)]
    tables = [list(range(1 + 5 * row, 6 + 5 * row)) for row in range(8)]
    cached, num_clear = [0] * 8, 0
    for step in range(60):
        rows = []
        for index in rng.permutation(8)[: 1 + step % 8]:
            count = min(int(rng.choice([1, 1, 1, 2, 3, 12])), 150 - cached[index])
            if count == 0:
                cached[index], count = int(rng.integers(1, 40)), 1  # a rewind: the same tokens are read again
            tokens = texts[index][cached[index] : cached[index] + count]
            num_outputs, temperature = int(rng.integers(0, count + 1)), float(rng.choice([0.0, 0.7, 1.0]))
            rows.append(_row(tables[index], cached[index], tokens, num_outputs, temperature))
            cached[index] += count
        expected, found = eager.engine.forward(rows), recorded.engine.forward(rows)
        np.testing.assert_allclose(found[1], expected[1], atol=PROB_TOLERANCE)
        # Of a token that is about as probable as its neighbour in the list either may come first.
        is_ahead = -np.diff(expected[1], axis=1) > 2 * PROB_TOLERANCE
        is_clear = np.logical_and(is_ahead, np.pad(is_ahead, ((0, 0), (1, 0)), constant_values=True)[:, :-1])
        np.testing.assert_array_equal(found[0][:, :-1][is_clear], expected[0][:, :-1][is_clear])
        num_clear += int(is_clear.sum())
    assert num_clear > 800


@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("name", ["qwen3-tied", "gemma3-sliding-window"])
def test_other_architecture_drafts_differently(name: str, is_recorded: bool, tmp_path: Path) -> None:
    world = _build(name, tmp_path, is_recorded)
    try:
        text = _text(9, 90)
        pages = [4, 9, 2]
        for start, end in ((0, 50), (50, 51), (51, 90)):
            outputs = world.engine.forward([_row(pages, start, text[start:end], end - start)])
            world.check(outputs, [text[: i + 1] for i in range(start, end)])
        world.engine.copy_slots([(2, 5, 26)])
        branches = [[*text, 1, 2], [*text, 3, 4]]
        tables = [4, 9, 2], [4, 9, 5]
        outputs = world.engine.forward([_row(p, 90, b[90:]) for p, b in zip(tables, branches, strict=True)])
        world.check(outputs, branches)
    finally:
        world.engine.close()


def test_vllm_is_asked_for_other_graphs_than_of_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration for a GPU, without one: as far as it follows from the settings, and not from the platform."""
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.platforms import current_platform

    from vllm_double.draft.engine.loader import EngineConfig, _vllm_config

    CONFIGS["llama"]().save_pretrained(tmp_path)
    monkeypatch.setattr(type(current_platform), "support_static_graph_mode", classmethod(lambda cls: True))
    monkeypatch.setattr(type(current_platform), "check_and_update_config", classmethod(lambda cls, config: None))
    settings = {"model": str(tmp_path), "device": "cuda:0", "dtype": "float32", "longest_text": 96, "max_num_seqs": 24}
    found = _vllm_config(EngineConfig(**settings)).compilation_config
    assert (found.mode, found.cudagraph_mode) == (CompilationMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY)
    assert found.cudagraph_capture_sizes == [1, 2, 4, 8, 16, 24] and found.max_cudagraph_capture_size == 24
    found = _vllm_config(EngineConfig(**settings, enforce_eager=True)).compilation_config
    assert (found.mode, found.cudagraph_mode) == (CompilationMode.NONE, CUDAGraphMode.NONE)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"device": "cuda:0"}, ""),
        ({"device": "cpu"}, "no CUDA graphs on cpu"),
        ({"device": "cuda:0", "enforce_eager": True}, "enforce_eager"),
        ({"device": "cuda:0", "tensor_parallel_size": 2, "rendezvous": "there"}, "several devices"),
    ],
)
def test_steps_are_recorded_where_they_must_not_be(settings: dict[str, Any], reason: str) -> None:
    from vllm_double.draft.engine.loader import EngineConfig

    found = EngineConfig("model", **settings).eager_because
    assert reason in found and bool(reason) == bool(found)


@pytest.mark.parametrize(
    ("mode", "supports", "reason"),
    [
        ("FULL_DECODE_ONLY", ["ALWAYS", "UNIFORM_SINGLE_TOKEN_DECODE"], ""),
        ("FULL_DECODE_ONLY", ["ALWAYS", "NEVER"], "the attention backend NUMBER_1 cannot be recorded"),
        ("NONE", ["ALWAYS"], "vLLM records no CUDA graphs of this model here"),
    ],
)
def test_steps_that_a_backend_cannot_record_are_recorded(mode: str, supports: list[str], reason: str) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    from vllm_double.draft.engine.loader import _not_recordable

    class Group:
        kv_cache_spec = None

        def __init__(self, number: int, support: str) -> None:
            self.backend = SimpleNamespace(get_name=lambda: f"NUMBER_{number}")
            self._support = AttentionCGSupport[support]

        def get_metadata_builder(self, ubatch: int) -> Any:
            return SimpleNamespace(get_cudagraph_support=lambda config, spec: self._support)

    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]))
    assert _not_recordable(config, [Group(*numbered) for numbered in enumerate(supports)]) == reason
