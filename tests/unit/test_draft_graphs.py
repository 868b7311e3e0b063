"""Recorded draft steps against the texts that their rows stand for, with a toy for a model: what it answers follows from every
token in the pages and from every buffer.

On a CPU a recording is the list of torch's operators with their tensors, run again one by one: as in a CUDA graph no Python
runs, and what was no tensor stays what it was. On a GPU it is a CUDA graph.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_double.draft.engine.base import SAMPLING_DTYPE, Batch
from vllm_double.draft.engine.cuda_graphs import CudaRecorder, Recorder, StepGraphs, StepInputs, bucket_sizes, record_steps

VOCAB, PAGE_SIZE, NUM_PAGES, MAX_LENGTH, NUM_CHILDREN = 61, 4, 192, 40, 5
PLACES = torch.arange(MAX_LENGTH)
LOGITS = torch.randn(97, VOCAB, generator=torch.Generator().manual_seed(0))
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Sampling(NamedTuple):
    """Of a row, as `Row` has it."""

    temperature: float
    seed: int = 0
    noise_scale: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


Rows: TypeAlias = "Sequence[tuple[int, list[int], int, int, float | Sampling]]"
"""Request, its text, tokens of it that have been read, outputs, how it is sampled: a temperature where there is no noise."""


class OperatorRecorder:
    """Replays operators on the tensors of the recording."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        calls: list[tuple[Any, ...]] = []

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                calls.append((func, args, kwargs or {}, result))
                return result

        with Mode():
            answer = step()

        def replay() -> torch.Tensor:
            self.num_replays += 1
            for func, args, kwargs, results in calls:
                again = func(*args, **kwargs)
                for new, old in zip(*((x if isinstance(x, (tuple, list)) else [x]) for x in (again, results)), strict=True):
                    old.copy_(new)
            return answer

        return replay


class Toy:
    """Pages of tokens; the next one follows from a sum over all in a row's text, its last token and its position."""

    def __init__(self, device: str) -> None:
        self.pages = torch.full((NUM_PAGES, PAGE_SIZE), 50, device=device)  # garbage that a sum would show
        self.places, self.logits = PLACES.to(device), LOGITS.to(device)
        self.seen: list[tuple[int, bool]] = []
        self.inputs: dict[int, StepInputs] = {}

    def prepare(self, inputs: StepInputs, recording: bool) -> None:
        assert torch.equal(inputs.seq_lens.cpu(), inputs.seq_lens_cpu), "the host's copy"
        assert torch.equal(inputs.query_start_loc.cpu(), inputs.query_start_loc_cpu)
        assert inputs.query_start_loc_cpu.tolist() == list(range(inputs.size + 1)), "one token a row"
        self.seen.append((inputs.size, recording))
        self.inputs[inputs.size] = inputs

    def step(self, inputs: StepInputs, sampled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        self.pages.view(-1)[inputs.slot_mapping] = inputs.input_ids
        texts = self.pages[inputs.block_table.long()].flatten(1)[:, :MAX_LENGTH]
        texts = torch.where(self.places < inputs.seq_lens[:, None], texts + 1, 0)
        line = (texts * (self.places**2 + 3)).sum(1) + 11 * inputs.input_ids + 5 * inputs.positions
        probs = (self.logits[line % 97] / inputs.temperatures[:, None]).softmax(-1)
        if not sampled:
            best = probs.topk(NUM_CHILDREN)
            return best.indices, best.values
        seeds, positions, scales = inputs.noise
        top_k, top_p, min_p = (column[:, None] for column in inputs.support)
        ranks = probs.argsort(-1, descending=True).argsort(-1)
        is_kept = (ranks < torch.where(top_k > 0, top_k, VOCAB)) & (probs >= min_p * probs.amax(-1, keepdim=True))
        is_kept &= probs >= (1 - top_p) / 4  # any rule that needs each parameter will do
        noise = torch.sin(seeds[:, None] * 0.37 + positions[:, None] * 1.1 + torch.arange(VOCAB, device=probs.device) * 2.3)
        scores = torch.where(is_kept, probs.log() + scales[:, None] * noise, -torch.inf)
        tokens = scores.topk(NUM_CHILDREN).indices
        return tokens, torch.where(is_kept, probs, 0.0).gather(1, tokens)

    @staticmethod
    def answer(text: Sequence[int], sampling: Sampling) -> tuple[list[int], list[float]]:
        """What comes after the text, from the text alone. Tokens of probability 0 are in no certain order."""
        values = torch.tensor(text)
        line = ((values + 1) * (PLACES[: len(text)] ** 2 + 3)).sum() + 11 * values[-1] + 5 * (len(text) - 1)
        probs = (LOGITS[line % 97] / (sampling.temperature or 1.0)).softmax(-1).tolist()
        by_prob = sorted(range(VOCAB), key=lambda token: -probs[token])
        if sampling.noise_scale == 0.0:  # then its parameters say nothing, unless another row of the batch is sampled
            return by_prob[:NUM_CHILDREN], [probs[token] for token in by_prob[:NUM_CHILDREN]]
        kept = [token for token in by_prob[: sampling.top_k or VOCAB] if probs[token] >= sampling.min_p * max(probs)]
        kept = [token for token in kept if probs[token] >= (1 - sampling.top_p) / 4]
        position = len(text) - 1
        kept.sort(
            key=lambda token: (
                -math.log(probs[token]) - sampling.noise_scale * math.sin(sampling.seed * 0.37 + position * 1.1 + token * 2.3)
            )
        )
        best = kept[:NUM_CHILDREN]
        return best, [probs[token] for token in best]


class Recorded:
    """A toy with recordings, and requests that have pages of their own."""

    def __init__(self, device: str, recorder: Recorder, limit: int = 16) -> None:
        self.toy = Toy(device)
        self.recorder = recorder
        self.graphs = StepGraphs(
            self.toy.prepare, self.toy.step, recorder, sizes=bucket_sizes(limit), num_children=NUM_CHILDREN,
            page_size=PAGE_SIZE, max_length=MAX_LENGTH, device=torch.device(device),
        )  # fmt: skip
        self.toy.seen.clear()

    @staticmethod
    def table(request: int) -> list[int]:
        return [1 + 10 * request + page for page in range(10)]

    def read(self, rows: Rows, num_children: int = NUM_CHILDREN) -> Any:
        lengths = [len(text) - start for _, text, start, _, _ in rows]
        used = [-(-len(text) // PAGE_SIZE) for _, text, *_ in rows]
        table = np.full((len(rows), max(used)), 77, dtype=np.int32)  # behind a row's last page is anything
        for index, (request, *_) in enumerate(rows):
            table[index, : used[index]] = self.table(request)[: used[index]]
        assert self.graphs.takes(sum(lengths), num_children)
        return self.graphs.forward(
            Batch(
                token_ids=np.array([token for _, text, start, _, _ in rows for token in text[start:]], dtype=np.int64),
                query_start=np.cumsum([0, *lengths], dtype=np.int32),
                starts=np.array([start for _, _, start, _, _ in rows], dtype=np.int32),
                num_outputs=np.array([wanted for *_, wanted, _ in rows], dtype=np.int32),
                sampling=np.array(
                    [(one.seed, one.temperature, one.noise_scale, *one[3:]) for one in map(sampling_of, rows)], SAMPLING_DTYPE
                ),
                pages=table,
            ),
            num_children,
        )

    def check(self, found: Any, rows: Rows) -> None:
        wanted = [(row[1][: len(row[1]) - back], sampling_of(row)) for row in rows for back in reversed(range(row[3]))]
        assert found[0].dtype == np.int32 and found[1].dtype == np.float32
        assert found[0].shape == found[1].shape == (len(wanted), NUM_CHILDREN)
        for line, (text, sampling) in enumerate(wanted):
            tokens, probs = Toy.answer(text, sampling)
            np.testing.assert_allclose(found[1][line][: len(probs)], probs, rtol=1e-5)
            assert found[0][line].tolist()[: len(tokens)] == tokens
            assert not found[1][line][len(probs) :].any()


def sampling_of(row: tuple[int, list[int], int, int, float | Sampling]) -> Sampling:
    return row[4] if isinstance(row[4], Sampling) else Sampling(row[4])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def recorded(request: pytest.FixtureRequest) -> Recorded:
    return Recorded(request.param, OperatorRecorder() if request.param == "cpu" else CudaRecorder())


def test_replays_of_random_rows_answer_for_their_texts(recorded: Recorded) -> None:
    rng = random.Random(0)
    texts: dict[int, list[int]] = {request: [] for request in range(12)}
    for _ in range(60):
        rows, room = [], 16
        for request in rng.sample(range(12), rng.randint(1, 12)):
            text = texts[request]
            if len(text) > MAX_LENGTH - 6 or rng.random() < 0.1:
                del text[rng.randrange(MAX_LENGTH - 6) :]  # a rewind: what is behind stays in the pages
            count = min(rng.choice([1, 1, 2, 5]), room)
            if count == 0:
                break
            room -= count
            start = len(text)
            text += [rng.randrange(VOCAB) for _ in range(count)]
            rows.append((request, list(text), start, rng.randint(0, count), rng.choice([0.0, 0.5, 1.0, 2.0])))
        recorded.check(recorded.read(rows), rows)
    assert recorded.toy.seen == [(size, False) for size, _ in recorded.toy.seen], "nothing is recorded while it drafts"


def test_replays_of_sampled_rows_are_those_rows_ranked_by_their_own_noise_and_support(recorded: Recorded) -> None:
    rng = random.Random(1)
    for _ in range(40):
        rows: list[Any] = []
        for request in rng.sample(range(12), rng.randint(1, 6)):
            text = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 8))]
            start = max(0, len(text) - rng.randint(1, 2))
            if start:
                recorded.read([(request, text[:start], 0, 0, 1.0)])
            sampling = Sampling(
                rng.choice([0.5, 1.0, 2.0]), rng.randrange(-(1 << 10), 1 << 10), rng.choice([0.5, 1.0, 2.0]),
                rng.choice([0, 0, 3, 7]), rng.choice([1.0, 1.0, 0.9]), rng.choice([0.0, 0.0, 0.2]),
            )  # fmt: skip
            rows.append((request, text, start, rng.randint(1, len(text) - start), rng.choice([sampling, Sampling(0.0)])))
        recorded.check(recorded.read(rows), rows)


def test_a_batch_without_noise_is_replayed_without_it(recorded: Recorded) -> None:
    """What noise and filters cost is paid where a row is sampled."""
    rows = [(0, [1, 2, 3], 0, 3, Sampling(1.0, seed=5, top_k=2))]
    recorded.check(recorded.read(rows), rows)
    (replays,) = {len(bucket.replays) for bucket in recorded.graphs._buckets}
    assert replays == 2


def test_padding_behind_sampled_rows_has_no_noise_and_no_filter(recorded: Recorded) -> None:
    sampling = Sampling(0.7, seed=-9, noise_scale=1.5, top_k=3, top_p=0.75, min_p=0.25)
    recorded.read([(request, [1], 0, 1, sampling) for request in range(16)])
    recorded.read([(request, [1], 0, 1, sampling) for request in range(9)])
    inputs = recorded.toy.inputs[16]
    assert inputs.noise.seeds.tolist() == [-9] * 9 + [0] * 7
    assert inputs.noise.scales.tolist() == [1.5] * 9 + [0.0] * 7
    assert inputs.support.top_k.tolist() == [3] * 9 + [0] * 7
    assert inputs.support.top_p.tolist() == [0.75] * 9 + [1.0] * 7
    assert inputs.support.min_p.tolist() == [0.25] * 9 + [0.0] * 7


@pytest.mark.parametrize("num_tokens", range(1, 14))
def test_a_batch_goes_into_the_smallest_bucket_that_it_fits(num_tokens: int) -> None:
    recorded = Recorded("cpu", OperatorRecorder(), limit=13)
    rows = [(request, [request], 0, 1, 1.0) for request in range(num_tokens - 1)]
    rows.append((num_tokens, [3], 0, 1, 0.0))
    recorded.check(recorded.read(rows), rows)
    assert recorded.toy.seen == [(next(size for size in (1, 2, 4, 8, 13) if num_tokens <= size), False)]


def test_padding_writes_to_page_0_alone(recorded: Recorded) -> None:
    before = recorded.toy.pages.clone()
    recorded.read([(request, [7, 8, 9], 0, 1, 1.0) for request in range(3)])  # 9 tokens in a bucket of 16
    changed = (recorded.toy.pages != before).nonzero().tolist()
    ours = [[recorded.table(request)[0], slot] for request in range(3) for slot in range(3)]
    assert [place for place in changed if place[0] != 0] == ours


def test_a_batch_sees_nothing_of_an_earlier_one(recorded: Recorded) -> None:
    text = [5] * 30
    recorded.read([(request, text, 29, 1, 2.0) for request in range(16)])
    rows = [(3, [9], 0, 1, 0.0)] + [(request, [1, 2], 1, 0, 0.0) for request in range(4, 12)]
    recorded.read(rows)
    inputs = recorded.toy.inputs[16]
    assert inputs.input_ids.tolist() == [9] + [2] * 8 + [0] * 7
    assert inputs.positions.tolist() == [0] + [1] * 8 + [0] * 7
    assert inputs.slot_mapping.tolist() == [31 * PAGE_SIZE] + [(1 + 10 * r) * PAGE_SIZE + 1 for r in range(4, 12)] + [0] * 7
    assert inputs.seq_lens.tolist() == [1] + [2] * 8 + [1] * 7
    assert inputs.temperatures.tolist() == [1.0] * 16
    assert inputs.block_table[:, 0].tolist() == [31] + [1 + 10 * r for r in range(4, 12)] + [0] * 7
    assert inputs.block_table[:, 1:].count_nonzero() == 0


def test_answers_stay_the_same_when_the_next_ones_come(recorded: Recorded) -> None:
    rows = [(0, [1, 2, 3], 0, 3, 1.0)]
    found = recorded.read(rows)
    recorded.read([(1, [4, 4, 4], 0, 3, 0.3)])
    recorded.check(found, rows)


def test_fewer_children_are_the_best_ones(recorded: Recorded) -> None:
    rows = [(0, [1, 2, 3], 0, 3, 1.0)]
    all_tokens, all_probs = recorded.read(rows)
    tokens, probs = recorded.read(rows, 2)
    assert tokens.tolist() == all_tokens[:, :2].tolist() and probs.tolist() == all_probs[:, :2].tolist()


def test_more_tokens_or_children_than_were_recorded_are_not_taken(recorded: Recorded) -> None:
    takes = recorded.graphs.takes
    assert takes(16, NUM_CHILDREN) and takes(1, 1)
    assert not takes(17, NUM_CHILDREN) and not takes(1, NUM_CHILDREN + 1)


def test_replays_run_no_python_of_the_step() -> None:
    recorded = Recorded("cpu", OperatorRecorder())
    recorded.toy.step = None  # type: ignore[assignment]
    recorded.graphs._step = None  # type: ignore[assignment]
    rows = [(0, [1, 2, 3], 0, 3, 1.0)]
    recorded.check(recorded.read(rows), rows)


def test_recording_begins_with_the_largest_bucket_and_warm_kernels() -> None:
    events: list[Any] = []
    toy = Toy("cpu")

    class Noting(OperatorRecorder):
        def __call__(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            events.append("record")
            return super().__call__(step)

    def prepare(inputs: StepInputs, recording: bool) -> None:
        inputs.seq_lens.fill_(1)  # as some backends do when they record
        events.append((inputs.size, recording))

    def step(inputs: StepInputs, sampled: bool) -> Any:
        events.append(("step", sampled))
        return toy.step(inputs, sampled)

    StepGraphs(
        prepare, step, Noting(), sizes=[1, 2, 4], num_children=NUM_CHILDREN, page_size=PAGE_SIZE, max_length=MAX_LENGTH,
        device=torch.device("cpu"),
    )  # fmt: skip
    expected: list[Any] = []
    for size in (4, 2, 1):
        for sampled in (False, True):
            expected += [(size, True)] if not sampled else []
            expected += [("step", sampled), (size, True), "record", ("step", sampled)]
            expected += [(size, False), ("step", sampled), (size, False)]
    assert events == expected


def test_sizes_are_powers_of_two_up_to_the_limit_itself() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(2) == [1, 2]
    assert bucket_sizes(24) == [1, 2, 4, 8, 16, 24]
    assert bucket_sizes(100_000) == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def _refuses(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


def _forgets(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    answer = step()
    return lambda: answer


def _keeps_inputs(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """As a recording of something that has copied its inputs to the host."""
    operators = OperatorRecorder()(step)
    kept = operators().clone()
    return lambda: kept


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Warnings and what is worse. vLLM's loggers, where it was imported, tell the root logger nothing."""
    logger = logging.getLogger("vllm.double")
    logger.addHandler(caplog.handler)
    propagate, logger.propagate = logger.propagate, False
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)
    logger.propagate = propagate


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        pytest.param(_refuses, "RuntimeError: operation not permitted when stream is capturing).", id="capture-fails"),
        pytest.param(_forgets, "a replay of 8 rows differs from the model", id="replay-does-nothing"),
        pytest.param(_keeps_inputs, "a replay of 8 rows differs from the model", id="values-in-the-graph"),
    ],
)
def test_forwards_stay_eager_if_recording_fails(recorder: Recorder, reason: str, said: Callable[[], list[str]]) -> None:
    toy = Toy("cpu")
    graphs = record_steps(
        toy.prepare, toy.step, recorder, sizes=[1, 8], num_children=NUM_CHILDREN, page_size=PAGE_SIZE,
        max_length=MAX_LENGTH, device=torch.device("cpu"),
    )  # fmt: skip
    assert graphs is None
    (line,) = said()
    assert reason in line and "eager" in line and "\n" not in line


def test_forwards_stay_eager_if_a_step_cannot_run(said: Callable[[], list[str]]) -> None:
    def step(inputs: StepInputs, sampled: bool) -> Any:
        raise torch.OutOfMemoryError("no memory")

    graphs = record_steps(
        Toy("cpu").prepare, step, OperatorRecorder(), sizes=[1], num_children=1, page_size=1, max_length=1,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert graphs is None and "OutOfMemoryError: no memory" in said()[0]
