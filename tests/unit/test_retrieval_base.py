import psutil
import pytest

from vllm_double.retrieval import Continuation
from vllm_double.retrieval.context_steps import context_steps
from vllm_double.retrieval.sources import Sources
from vllm_double.retrieval.suffix_automaton.arena import Arena


@pytest.mark.parametrize("length", [1, 8, 1023, 1024, 5000])
def test_beliefs_are_chances_that_grow_with_the_evidence(length: int) -> None:
    found = Continuation.of([5] * 1024, length, [1] * 1024, [2] * 1024)
    assert len(found.beliefs) == 1024 and all(0 < belief < 1 for belief in found.beliefs)
    assert Continuation.of([5], length, [2], [2]).beliefs > found.beliefs[:1], "what always went on so"
    assert Continuation.of([5], length, [2], [4]).beliefs > found.beliefs[:1], "more often seen"
    assert Continuation.of([5], length + 1, [1], [2]).beliefs >= found.beliefs[:1], "a longer match"


def test_sources_are_compiled_when_they_are_opened() -> None:
    context_steps.cache_clear()
    Sources().open()
    assert context_steps.cache_info().currsize == 1


def test_large_arrays_take_memory_where_they_are_written() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    array = Arena(92 << 28).arrays.text[: 1 << 28]
    array[:: 1 << 23] = 1
    assert process.memory_info().rss - before < 1 << 20, "32 pages of 4 KiB"
    assert array[:: 1 << 23].sum() == 32 and not array[1 : 1 << 20].any()
