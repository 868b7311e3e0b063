"""What a draft worker lists for sampled requests, and what it learns of the target's draws, with a model that is a function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from double_kernels import gumbel_noise

from tests.draft_view import check_integrity
from tests.fakes.engine import is_kept
from tests.witness import WitnessEngine
from vllm_double.draft.engine.base import Row
from vllm_double.draft.frontier import Frontier, FrontierLimits
from vllm_double.transport.messages import Admit, Commit

VOCAB = 14
NO_CHAIN = np.empty(0, np.int32), np.empty(0, np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


class Sampled:
    """A frontier, requests with parameters of their own, and a target with the draft's distribution."""

    def __init__(self, *admissions: Admit) -> None:
        self.engine = WitnessEngine(VOCAB, num_pages=200, page_size=3, max_length=60)
        limits = FrontierLimits(4, nodes_per_iteration=6, children_per_node=8, min_path_prob=1e-4, max_nodes=1000)
        self.frontier = Frontier(self.engine, limits)
        self.admissions = {admission.handle: admission for admission in admissions}
        self.texts = {admission.handle: admission.tokens.tolist() for admission in admissions}
        for admission in admissions:
            self.frontier.apply(admission)

    def drawn(self, handle: int, text: Any) -> int:
        """What the target draws behind the text."""
        admission, text = self.admissions[handle], list(text)
        logits = self.engine._next_token(text) / (admission.temperature or 1.0)
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        if admission.temperature == 0:
            return int(probs.argmax())
        row = Row((), 0, (), 0, 1.0, top_k=admission.top_k, top_p=admission.top_p, min_p=admission.min_p)
        scores = np.log(probs) + gumbel_noise(np.array(admission.seed), np.array(len(text) - 1), np.arange(VOCAB))
        return int(np.where(is_kept(probs, row), scores, -np.inf).argmax())

    def iterate(self) -> list[tuple[Any, bytes]]:
        """One draft forward; its records, each with the text that it stands behind."""
        batch = self.frontier.select()
        if not len(batch):
            return []
        self.engine.copy_slots(self.frontier.tail_copies)
        records = self.frontier.expand(*self.engine.forward(batch, 8))
        return list(zip(records, self.engine.contexts, strict=True))

    def commit(self, handle: int, *tokens: int) -> None:
        text = self.texts[handle]
        self.frontier.apply(Commit(handle, len(text), ints(*tokens), *NO_CHAIN))
        text += tokens


ADMISSIONS = (
    Admit(1, 3, ints(1, 2, 3), 1.0, 60, (), "", seed=5),
    Admit(2, 2, ints(4, 4), 0.7, 60, (), "", seed=-(1 << 63), top_k=4),
    Admit(3, 4, ints(1, 2, 3, 4), 1.5, 60, (), "", seed=(1 << 63) - 1, top_p=0.8, min_p=0.05),
    Admit(4, 3, ints(1, 2, 3), 0.0, 60, (), ""),
)


def test_the_first_token_of_every_list_is_what_a_target_with_the_same_distribution_draws() -> None:
    world = Sampled(*ADMISSIONS)
    num_records = dict.fromkeys(world.texts, 0)
    for _ in range(12):
        for record, context in world.iterate():
            handle = int(record["handle"])
            assert record["tokens"][0] == world.drawn(handle, context)
            num_records[handle] += 1
        check_integrity(world.frontier)
    assert min(num_records.values()) >= 4


def test_listed_chances_are_those_of_the_coupling_whatever_was_learnt() -> None:
    world, listed = Sampled(*ADMISSIONS), 0
    for number in range(12):
        world.iterate()
        if number % 4 == 3:
            for handle in (1, 2, 3):
                world.commit(handle, world.drawn(handle, world.texts[handle]))
        arena, coupling = world.frontier._arena, world.frontier._coupling
        if number < 4:
            assert coupling.weights(1.0)[2] == 1.0
        for node in world.frontier._forward.outputs[: world.frontier._forward.progress["num_outputs"][0]].tolist():
            slot = int(arena.nodes["slot"][node])
            one, seed = arena.listed[node, : arena.nodes["num_listed"][node]], int(world.frontier._draws["seed"][slot])
            if not arena.requests["is_sampled"][slot] or number % 4 == 3:  # the weights are newer than the list
                continue
            noise = gumbel_noise(np.array(seed), arena.nodes["position"][node], one["token"])
            np.testing.assert_allclose(one["noise"], noise, rtol=1e-4, atol=1e-5)
            temperature = world.frontier._by_slot[slot].temperature
            log_q_weight, noise_weight, coverage = coupling.weights(temperature)
            expected = np.exp(log_q_weight * one["log_q"] + noise_weight * one["noise"])
            np.testing.assert_allclose(one["prob"], coverage * expected / expected.sum(), rtol=1e-4, atol=1e-7)
            listed += 1
    assert listed > 20


def test_records_carry_chances_that_fall() -> None:
    world = Sampled(*ADMISSIONS)
    for _ in range(12):
        for record, _ in world.iterate():
            probs = record["probs"][: record["count"]]
            assert (np.diff(probs) <= 1e-6).all() and 0 < probs.sum() <= 1 + 1e-5


def test_tokens_that_the_target_does_not_draw_from_have_no_chance() -> None:
    world = Sampled(ADMISSIONS[1])
    for _ in range(8):
        for record, _ in world.iterate():
            assert (record["probs"][4 : record["count"]] == 0).all() and record["probs"][:4].all()


def test_the_list_behind_the_text_is_learnt_from_with_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    world, learnt = Sampled(*ADMISSIONS), []
    monkeypatch.setattr(world.frontier._coupling, "learn", lambda *lesson: learnt.append(lesson))
    for handle in (1, 2, 3, 4) * 4:
        for _ in range(3):
            world.iterate()
        text = world.texts[handle]
        drawn = world.drawn(handle, text)
        learnt.clear()
        world.commit(handle, drawn)
        if handle == 4:
            assert not learnt, "a greedy request teaches nothing of noise"
            continue
        ((temperature, tokens, _, noise, token),) = learnt
        admission = world.admissions[handle]
        assert (temperature, token) == (admission.temperature, drawn) and tokens[0] == drawn
        expected = gumbel_noise(np.array(admission.seed), np.array(len(text) - 2), tokens)
        np.testing.assert_allclose(noise, expected, atol=1e-5)  # compiled, its logarithms round otherwise


def test_a_commit_of_several_tokens_teaches_as_many_lists_as_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    world, learnt = Sampled(ADMISSIONS[0]), []
    monkeypatch.setattr(world.frontier._coupling, "learn", lambda *lesson: learnt.append(lesson))
    contexts = {context for _ in range(12) for _, context in world.iterate()}
    text = list(world.texts[1])
    for _ in range(4):
        text.append(world.drawn(1, text))
    prefixes = [bytes(text[:length]) for length in range(3, len(text))]
    world.commit(1, *text[3:])
    assert [lesson[-1] for lesson in learnt] == [text[len(one)] for one in prefixes if one in contexts]
    assert len(learnt) >= 3


def test_a_text_that_goes_back_is_learnt_from_by_what_is_drawn_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world, learnt = Sampled(ADMISSIONS[0]), []
    monkeypatch.setattr(world.frontier._coupling, "learn", lambda *lesson: learnt.append(lesson))
    for _ in range(6):
        world.iterate()
    world.commit(1, 7, 5)
    learnt.clear()
    world.frontier.apply(Commit(1, 4, ints(6, 8), *NO_CHAIN))
    assert not learnt, "the lists were of another text"
    check_integrity(world.frontier)


def test_tokens_of_the_prompt_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[Any] = []
    world = Sampled()
    monkeypatch.setattr(world.frontier._coupling, "learn", lambda *lesson: learnt.append(lesson))
    world.frontier.apply(Admit(1, 6, ints(1, 2, 3), 1.0, 60, (), "", seed=5))
    for _ in range(3):
        world.iterate()
    world.frontier.apply(Commit(1, 3, ints(4, 5, 6), *NO_CHAIN))
    assert not learnt
