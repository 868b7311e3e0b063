"""The scripted target on vLLM's server: its replies are the script, however it is served; all else is the bundled target's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import scripted, workload
from benchmarks.arms import Arm
from benchmarks.client import Request
from benchmarks.harness import Fleet
from benchmarks.metrics import counters, growth, speculation
from benchmarks.scripted.edits import Edit
from benchmarks.scripted.write import write
from benchmarks.server import ServerConfig

transformers = pytest.importorskip("transformers")
pytest.importorskip("vllm")
pytestmark = pytest.mark.integration

PLAIN = Arm("plain")
NGRAM = Arm("ngram", {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 5, "prompt_lookup_min": 2})
Workload = tuple[Path, list[Edit]]


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """The scripted target's folder and its edits, longer than a page of the CPU's cache (128 tokens)."""
    folder = tmp_path_factory.mktemp("scripted") / "target"
    return folder, write(workload.TARGET, folder, 3, piece_tokens=(130, 220))


@pytest.fixture(scope="module")
def fleet(edits: Workload, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A plain server and one with drafts from the context; prompts come in chunks and are cached."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    chunks = ("--max-num-batched-tokens", "96")
    config = ServerConfig(edits[0], cores, max_model_len=1024, extra=chunks, environment=scripted.environment())
    with Fleet([PLAIN, NGRAM], config, tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


@pytest.mark.parametrize(("batch", "temperature"), [(1, 0.0), (3, 0.0), (3, 1.0)], ids=["B1-T0", "B3-T0", "B3-T1"])
@pytest.mark.parametrize("arm", [PLAIN, NGRAM], ids=["plain", "ngram"])
def test_replies_are_the_script(fleet: Fleet, edits: Workload, arm: Arm, batch: int, temperature: float) -> None:
    prompts = workload.load_prompts(edits[0] / "prompts.jsonl", 3)
    # At batch 3 twins run side by side, and the second one goes on from pages that the first one fills.
    chosen = [0, 1] if batch == 1 else [0, 0, 1, 1, 2]
    before = counters(fleet.server(arm).metrics())
    requests = workload.requests([prompts[index] for index in chosen], 512, temperature)
    for index, completion in zip(chosen, fleet.ask(arm, requests, batch).completions, strict=True):
        assert completion.tokens == edits[1][index].reply_tokens
        assert completion.text == edits[1][index].reply
        assert completion.finish_reason == "stop"
    spent = speculation(growth(before, counters(fleet.server(arm).metrics())))
    if arm is NGRAM:
        assert spent.acceptance is not None
        assert spent.acceptance < 1 < 1.5 < spent.tokens_per_forward, "drafts were not accepted, or none was rejected"


def test_another_prompt_is_answered_as_by_the_bundled_target(fleet: Fleet, edits: Workload) -> None:
    edit = edits[1][0]
    texts = [workload.load_prompts(workload.PROMPTS, 1)[0].text, edit.prompt[1:], edit.prompt + edit.reply + "\n"]
    found = fleet.ask(PLAIN, [Request(str(index), text, 12) for index, text in enumerate(texts)], 1).completions
    tokenizer = transformers.AutoTokenizer.from_pretrained(workload.TARGET)
    bundled = transformers.AutoModelForCausalLM.from_pretrained(workload.TARGET, dtype="float32")
    for text, completion in zip(texts, found, strict=True):
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = bundled.generate(tokens, max_new_tokens=12, do_sample=False)[0, tokens.shape[1] :]
        assert completion.tokens == expected.tolist()
