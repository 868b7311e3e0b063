"""Sources in one call against the same sources one by one: whole rounds of two proposers that are told the same."""

import random

import numpy as np
import pytest

from tests.unit.test_proposer import Ticks
from vllm_double.retrieval.bundle import Bundle
from vllm_double.retrieval.context import ContextRetriever
from vllm_double.retrieval.sources import Sources
from vllm_double.target.proposer import Proposer, RequestParams, Row

K, VOCAB = 8, 30


def proposer(sources: Sources, is_bundled: bool) -> Proposer:
    made = Proposer(K, None, sources.open(), Ticks(), VOCAB)
    if is_bundled:
        assert made.lookups.are_bundled
    else:
        made.lookups.bundle = Bundle([])
    return made


class Speaker:
    """Says phrases over and over, with changes."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.phrases = [[rng.randrange(VOCAB) for _ in range(rng.randint(2, 12))] for _ in range(4)]

    def say(self, num_tokens: int) -> list[int]:
        text: list[int] = []
        while len(text) < num_tokens:
            text += self.rng.choice(self.phrases)
            if self.rng.random() < 0.2:
                text[-1] = self.rng.randrange(VOCAB)
        return text[:num_tokens]


@pytest.mark.parametrize("history_tokens", [0, 2000])
@pytest.mark.parametrize("seed", range(6))
def test_bundled_sources_give_the_chains_that_they_give_one_by_one(seed: int, history_tokens: int) -> None:
    rng = random.Random(seed)
    speaker, sources = Speaker(rng), Sources(history_tokens=history_tokens, share_history=True)
    both = proposer(sources, True), proposer(sources, False)
    texts: dict[str, list[int]] = {}
    chains: dict[str, list[int]] = {}
    num_proposed = 0
    for number in range(120):
        if len(texts) < 4 and rng.random() < 0.4:
            name = f"r{number}"
            texts[name], chains[name] = speaker.say(rng.randint(1, 300)), []
            params = RequestParams(
                rng.choice([0.0, 0.7]), 2000, frozenset({rng.randrange(VOCAB)}), use_drafts=rng.random() < 0.9, seed=number
            )
            for one in both:
                one.admit(name, np.array(texts[name], np.int32), params)
        elif texts and rng.random() < 0.1:
            name = rng.choice(list(texts))
            del texts[name], chains[name]
            for one in both:
                one.finish(name)
        rows = []
        for name, text in texts.items():
            chain = chains[name]
            num_accepted = rng.randint(0, len(chain))
            new = [*chain[:num_accepted], *speaker.say(1)]
            if rng.random() < 0.02:
                del text[len(text) // 2 :]  # a rewind
            text += new
            rows.append(Row(name, np.array(text, np.int32), len(new), chain))
        found = [one.propose(rows) for one in both]
        assert found[0] == found[1]
        for one in both:
            one.check_integrity()
        chains = dict(zip(texts, found[0], strict=True))
        num_proposed += sum(map(len, found[0]))
        budget = rng.choice([0, 16, 64, 4096])
        for one in both:
            one.index(budget)
    assert num_proposed > 100


def test_sources_that_share_no_arena_are_asked_one_by_one() -> None:
    assert Bundle([ContextRetriever()]).num_sources == 0
    assert Bundle([]).num_sources == 0
    assert Bundle(Sources().open()).num_sources == 2
    assert Bundle(Sources(history_tokens=100).open()).num_sources == 3
