"""Copying with changes: what is offered behind a replaced, inserted or removed piece, and in its place later."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_double.retrieval import ContextRetriever, EditRetriever, Source

KEY = 0
SHOWN = list(range(100, 160))


class Both:
    """A context and the edits that read it, told the same."""

    def __init__(self, prompt: list[int]) -> None:
        self.context = ContextRetriever()
        self.edit = EditRetriever(self.context)
        for retriever in self.retrievers:
            retriever.start(KEY, np.array(prompt, np.int32), None)
        self.context.work(len(prompt))

    @property
    def retrievers(self) -> list[Source]:
        return [self.context, self.edit]

    def extend(self, *tokens: int) -> None:
        for token in tokens:
            for retriever in self.retrievers:
                retriever.extend(KEY, [token])

    def offered(self, tail: tuple[int, ...] = (), max_tokens: int = 4) -> list[int]:
        found = self.edit.lookup(KEY, tail, max_tokens)
        return [] if found is None else found.tokens


@pytest.fixture
def copying() -> Both:
    """The reply has copied the first ten tokens of what was shown."""
    both = Both([*SHOWN, 1, 2])
    both.extend(*SHOWN[:10])
    return both


def test_nothing_is_offered_before_anything_is_copied() -> None:
    both = Both([*SHOWN, 1, 2])
    assert both.offered() == []
    both.extend(*SHOWN[:5])
    assert both.offered() == []


def test_while_the_copy_follows_the_text_the_context_is_left_to_say_so(copying: Both) -> None:
    assert copying.offered() == []
    found = copying.context.lookup(KEY, (), 2)
    assert found is not None and found.tokens == SHOWN[10:12]


def test_behind_a_departure_the_copy_goes_on_behind_what_was_replaced(copying: Both) -> None:
    copying.extend(7)
    assert copying.offered() == SHOWN[11:15]


def test_behind_a_longer_replacement_the_copy_goes_on_where_its_tokens_are_found_again(copying: Both) -> None:
    copying.extend(7, 8, 9, SHOWN[11])
    assert copying.offered() == SHOWN[12:16]
    copying.extend(SHOWN[12], SHOWN[13])
    assert copying.offered() == SHOWN[14:18]


def test_behind_removed_tokens_the_copy_goes_on(copying: Both) -> None:
    copying.extend(SHOWN[15], SHOWN[16])
    assert copying.offered() == SHOWN[17:21]


def test_behind_inserted_tokens_the_copy_goes_on(copying: Both) -> None:
    copying.extend(7, 8, 9, SHOWN[10], SHOWN[11])
    assert copying.offered() == SHOWN[12:16]


def test_what_was_replaced_is_replaced_again() -> None:
    shown = [*range(100, 110), 50, 51, *range(110, 120), 50, 51, *range(120, 130), 50, 51, *range(130, 140)]
    both = Both([*shown, 1, 2])
    both.extend(*shown[:10], 7, 8, 9, *shown[12:20])
    assert both.offered() == [*shown[20:22], 7, 8]
    assert both.offered(max_tokens=6) == [*shown[20:22], 7, 8, 9, shown[24]]
    both.extend(*shown[20:22], 7)
    assert both.offered() == [8, 9, *shown[24:26]]


def test_a_replacement_that_was_refused_once_is_not_offered_again() -> None:
    shown = [*range(100, 110), 50, *range(110, 120), 50, *range(120, 130), 50, *range(130, 140)]
    both = Both([*shown, 1, 2])
    both.extend(*shown[:10], 7, *shown[11:20])
    assert both.offered() == [shown[20], 7, *shown[22:24]]
    both.extend(*shown[20:30])
    assert both.offered(max_tokens=8) == [], "the text itself goes on"


def test_a_tail_is_followed_and_not_kept(copying: Both) -> None:
    assert copying.offered((7,)) == SHOWN[11:15]
    assert copying.offered((7, 8, SHOWN[11], SHOWN[12])) == SHOWN[13:17]
    assert copying.offered((SHOWN[10], 7)) == SHOWN[12:16]
    assert copying.offered() == []


def test_copying_ends_with_a_long_piece_of_something_else(copying: Both) -> None:
    copying.extend(*range(200, 240))
    assert copying.offered() == []


def test_a_request_has_its_own_copy_and_its_key_once(copying: Both) -> None:
    with pytest.raises(ValueError, match="started already"):
        copying.edit.start(KEY, np.array([1], np.int32), None)
    copying.edit.stop(KEY)
    with pytest.raises(KeyError):
        copying.edit.lookup(KEY, (), 1)


def test_a_long_prompt_that_waits_is_not_copied_from_yet() -> None:
    both = Both([1, 2])
    both.context.stop(KEY)
    both.edit.stop(KEY)
    for retriever in both.retrievers:
        retriever.start(KEY, np.arange(100, 5000, dtype=np.int32), None)
    both.extend(*range(100, 110))
    assert both.edit.lookup(KEY, (), 4) is None
    both.context.work(10_000)
    both.extend(110)
    both.extend(7)
    assert both.offered() == [112, 113, 114, 115]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_lookups_change_nothing_and_offer_what_is_in_the_text(data: st.DataObject) -> None:
    """Copies of a text over few words, with any changes."""
    word = st.integers(0, 5)
    shown = data.draw(st.lists(word, min_size=20, max_size=60))
    both, place = Both(shown), 0
    for _ in range(data.draw(st.integers(1, 12))):
        copied = shown[place : place + data.draw(st.integers(0, 12))]
        place += len(copied) + data.draw(st.integers(0, 3))
        new = [*copied, *data.draw(st.lists(word, max_size=3))]
        before = both.offered(max_tokens=8)
        tailed = both.offered(tuple(new), max_tokens=8)
        assert both.offered(max_tokens=8) == before, "a lookup leaves no trace"
        assert len(tailed) <= 8 and set(tailed) <= set(range(6))
        if not both.edit._requests[KEY].replacements:
            text = both.context.text(KEY).tolist()
            for offered in (before, tailed):
                assert any(text[start : start + len(offered)] == offered for start in range(len(text))), "not in the text"
        both.extend(*new)
