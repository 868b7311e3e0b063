"""The fake engine catches what a wrong block table, fork, rewind or free page would do to a real one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from tests.fakes.engine import FakeEngine, hashed_logits
from vllm_double.draft.engine.base import Batch, DraftEngine, Row

VOCAB_SIZE = 11
PAGE_SIZE = 4


class _RowEngine(FakeEngine):
    def forward(self, rows: Sequence[Row], num_children: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[override]
        return super().forward(Batch.of(rows), num_children)


def _engine() -> _RowEngine:
    return _RowEngine(hashed_logits(VOCAB_SIZE), vocab_size=VOCAB_SIZE, num_pages=12, page_size=PAGE_SIZE, max_length=24)


def _row(pages: Sequence[int], start: int, tokens: Sequence[int], num_outputs: int = 1, t: float = 0.0) -> Row:
    return Row(pages=pages, start=start, tokens=tokens, num_outputs=num_outputs, temperature=t)


def _expected(text: Sequence[int], num_children: int, temperature: float = 1.0) -> tuple[list[int], list[float]]:
    logits = hashed_logits(VOCAB_SIZE)(text) / temperature
    probs = np.exp(logits) / np.exp(logits).sum()
    best = sorted(range(VOCAB_SIZE), key=lambda token: (-probs[token], token))[:num_children]
    return best, [float(probs[token]) for token in best]


def _check(outputs: tuple[np.ndarray, np.ndarray], texts: Sequence[Sequence[int]], temperature: float = 1.0) -> None:
    tokens, probs = outputs
    assert tokens.dtype == np.int32
    assert probs.dtype == np.float32
    assert len(tokens) == len(probs) == len(texts)
    for index, text in enumerate(texts):
        best, expected = _expected(text, tokens.shape[1], temperature)
        assert tokens[index].tolist() == best
        np.testing.assert_allclose(probs[index], expected, rtol=1e-6)


def test_it_is_a_draft_engine() -> None:
    engine: DraftEngine = FakeEngine(hashed_logits(11), vocab_size=11, num_pages=12, page_size=4, max_length=24)
    assert (engine.page_size, engine.num_pages, engine.max_length, engine.vocab_size) == (4, 12, 24, 11)


def test_it_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, tests.fakes.engine; print(*{'torch', 'vllm'}.intersection(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == ""


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 10])
def test_chunks_of_a_prompt_give_the_distributions_of_the_whole(chunk: int) -> None:
    engine = _engine()
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    for start in range(0, 10, chunk):
        tokens = text[start : start + chunk]
        outputs = engine.forward([_row([5, 2, 7], start, tokens, len(tokens))], 3)
        _check(outputs, [text[: start + i + 1] for i in range(len(tokens))])
    assert engine.context([5, 2, 7], 10) == text
    assert engine.num_query_tokens == 10


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    _check(_engine().forward([_row([1], 0, [3, 4], t=temperature)], 4), [[3, 4]], temperature)


def test_branches_of_a_fork_keep_their_own_texts() -> None:
    engine = _engine()
    engine.forward([_row([1, 2], 0, [1, 2, 3, 4, 5, 6], 0)], 2)
    engine.copy_slots([(2, 3, 2)])
    outputs = engine.forward([_row([1, 2], 6, [7]), _row([1, 3], 6, [8, 9], 2)], 2)
    _check(outputs, [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 8], [1, 2, 3, 4, 5, 6, 8, 9]])
    assert engine.num_copied_slots == 2


def test_rewritten_slots_hold_the_new_tokens() -> None:
    engine = _engine()
    engine.forward([_row([1, 2], 0, [1, 2, 3, 4, 5, 6], 0)], 2)
    _check(engine.forward([_row([1, 2], 3, [9, 9])], 2), [[1, 2, 3, 9, 9]])


def test_reading_a_slot_that_was_never_written_fails() -> None:
    engine = _engine()
    engine.forward([_row([1], 0, [1, 2], 0)], 2)
    with pytest.raises(AssertionError, match="poisoned slot"):
        engine.forward([_row([1], 3, [4])], 2)


def test_reading_a_freed_page_fails() -> None:
    engine = _engine()
    engine.forward([_row([1], 0, [1, 2], 0)], 2)
    engine.poison([1])
    with pytest.raises(AssertionError, match="poisoned slot"):
        engine.forward([_row([1], 2, [4])], 2)


def test_reading_a_tail_page_that_another_branch_has_written_fails() -> None:
    engine = _engine()
    engine.forward([_row([1], 0, [1, 2], 0)], 2)
    engine.forward([_row([1], 2, [3], 0)], 2)
    engine.forward([_row([1], 2, [4], 0)], 2)
    engine.forward([_row([1], 3, [5], 0)], 2)
    assert engine.context([1], 4) == [1, 2, 4, 5]
    engine.forward([_row([1], 2, [3], 0)], 2)
    with pytest.raises(AssertionError, match="another branch"):
        engine.forward([_row([1, 2], 4, [6])], 2)


def test_reading_a_page_behind_another_prefix_fails() -> None:
    engine = _engine()
    engine.forward([_row([1, 2], 0, [1, 2, 3, 4, 5], 0), _row([3, 4], 0, [1, 2, 3, 9, 5], 0)], 2)
    with pytest.raises(AssertionError, match="another branch"):
        engine.forward([_row([1, 4], 5, [6])], 2)


def test_two_rows_that_write_one_slot_fail() -> None:
    engine = _engine()
    with pytest.raises(AssertionError, match="both write"):
        engine.forward([_row([1], 0, [1, 2]), _row([1], 0, [1])], 2)


def test_reading_a_slot_that_another_row_writes_fails() -> None:
    engine = _engine()
    engine.forward([_row([1], 0, [1, 2, 3], 0)], 2)
    with pytest.raises(AssertionError, match="which row 0 writes"):
        engine.forward([_row([1], 2, [3]), _row([1], 3, [4])], 2)


def test_copying_more_than_was_written_fails() -> None:
    engine = _engine()
    engine.forward([_row([1], 0, [1, 2], 0)], 2)
    with pytest.raises(AssertionError, match="poisoned slots"):
        engine.copy_slots([(1, 2, 3)])


def test_reading_behind_a_fork_of_too_few_slots_fails() -> None:
    engine = _engine()
    engine.forward([_row([1], 0, [1, 2, 3], 0), _row([2], 0, [1, 2, 3], 0)], 2)
    engine.copy_slots([(1, 2, 2)])
    with pytest.raises(AssertionError, match="poisoned slot"):
        engine.forward([_row([2], 3, [4])], 2)


@pytest.mark.parametrize("triples", [[(0, 1, 1), (2, 1, 1)], [(0, 1, 1), (1, 2, 1)], [(0, 12, 1)], [(0, 1, 5)]])
def test_impossible_copies_are_refused(triples: list[tuple[int, int, int]]) -> None:
    engine = _engine()
    engine.forward([_row([page], 0, [1, 2, 3, 4], 0) for page in (0, 1, 2)], 2)
    with pytest.raises(ValueError, match="cop"):
        engine.copy_slots(triples)
    assert engine.context([1], 4) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(_row([1], 0, []), id="no-tokens"),
        pytest.param(_row([1], -1, [1]), id="negative-start"),
        pytest.param(_row([1], 0, [1], 2), id="too-many-outputs"),
        pytest.param(_row([1], 4, [1]), id="page-missing"),
        pytest.param(_row([12], 0, [1]), id="page-out-of-range"),
        pytest.param(_row([1], 0, [VOCAB_SIZE]), id="token-out-of-vocabulary"),
        pytest.param(_row(range(1, 8), 24, [1]), id="beyond-the-model"),
        pytest.param(_row([1], 0, [1], t=-1.0), id="negative-temperature"),
    ],
)
def test_a_malformed_row_is_refused_before_anything_is_written(row: Row) -> None:
    engine = _engine()
    with pytest.raises(ValueError, match="row 1"):
        engine.forward([_row([2], 0, [1]), row], 2)
    with pytest.raises(AssertionError, match="poisoned slot"):
        engine.context([2], 1)


@pytest.mark.parametrize("num_children", [0, VOCAB_SIZE + 1])
def test_impossible_numbers_of_children_are_refused(num_children: int) -> None:
    with pytest.raises(ValueError, match="num_children"):
        _engine().forward([_row([1], 0, [1])], num_children)
