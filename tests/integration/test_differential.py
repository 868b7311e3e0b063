"""Whatever can be asked over HTTP is answered as without drafts: by plain vLLM if it is greedy, else by the same server.

The server with drafts has few blocks and small steps, so that requests are preempted and prompts come in pieces; requests run
side by side, in another order on each server.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from benchmarks import workload
from benchmarks.metrics import counters
from benchmarks.server import Server, ServerConfig
from tests.chaos.chaos import wait_for
from tests.integration.llm import DRAFT, MAX_LEN, prompts

pytest.importorskip("vllm")
pytestmark = pytest.mark.integration

# Of the order of what sums in another order differ by.
LOGPROB_TOLERANCE = 2e-3
DECLINED = {"vllm_xargs": {"double": '{"enabled": false}'}}
UNLIKE = {"id", "created", "created_at", "completed_at", "request_id", "system_fingerprint", "item_id", "metrics", "vllm_xargs"}
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= "x = " [0-9]+ (" + " [0-9]+)*'
FORMATS: dict[str, dict[str, Any]] = {
    "choice": {"structured_outputs": {"choice": ["return", "def f(x):\n    return x", "import os"]}},
    "regex": {"structured_outputs": {"regex": r"[a-z]{3,9}\([a-z, ]{0,12}\)"}},
    "json": {"structured_outputs": {"json": SCHEMA}},
    "grammar": {"structured_outputs": {"grammar": GRAMMAR}},
}
Case = tuple[str, dict[str, Any]]  # path, body


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Code, from half a line to most of what the model can read."""
    found = [text[:length] for text, length in zip(prompts(6), (12, 90, 240, 400, 700, 60), strict=True)]
    found[5] = found[5] * 4  # what follows is in the prompt
    return found


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Plain vLLM, and double."""
    logs = tmp_path_factory.mktemp("logs")
    cores = tuple(sorted(os.sched_getaffinity(0)))
    common = ("--scheduling-policy", "priority", "--chat-template", TEMPLATE, "--structured-outputs-config.backend", "xgrammar")
    scarce = ("--num-gpu-blocks-override", "9", "--max-num-batched-tokens", "160")
    double = {"method": "double", "model": str(DRAFT), "num_speculative_tokens": 7}
    settings: dict[str, Any] = {"max_model_len": MAX_LEN, "max_num_seqs": 8, "threads": "auto"}
    plain_config = ServerConfig(workload.TARGET, cores, extra=common, **settings)
    double_config = ServerConfig(workload.TARGET, cores, speculative=double, extra=(*common, *scarce), **settings)
    with Server("plain", plain_config, logs) as plain, Server("double", double_config, logs) as ours:
        plain.wait_healthy()
        ours.wait_healthy()
        wait_for(lambda: metric(ours, "worker_up") == 1, 120, ours.tail)
        yield plain, ours


def greedy(texts: list[str]) -> Iterator[tuple[str, Case]]:
    """By name, what plain vLLM answers alike."""
    families: dict[str, dict[str, Any]] = {
        "nothing said": {},
        "one token": {"max_tokens": 1},
        "two tokens": {"max_tokens": 2},
        "to the model's length": {"max_tokens": None, "ignore_eos": True},
        "a stop word": {"stop": "\n"},
        "stop words that stay": {"stop": ["return", "(x", "self"], "include_stop_str_in_output": True},
        "logprobs": {"logprobs": 3, "return_tokens_as_token_ids": True},
        "logprobs of the token alone": {"logprobs": 0},
        "logprobs of the prompt": {"prompt_logprobs": 2, "max_tokens": 6},
        "echo": {"echo": True, "logprobs": 1, "max_tokens": 8},
        "presence": {"presence_penalty": 1.5},
        "frequency": {"frequency_penalty": 1.2, "presence_penalty": -0.5},
        "repetition": {"repetition_penalty": 1.3},
        "bias": {"logit_bias": {"300": 4.0, "13": -100.0}},
        "bad words": {"bad_words": ["self", " return", "x"]},
        "allowed tokens": {"allowed_token_ids": [*range(20, 400)]},
        "special tokens": {"skip_special_tokens": False, "spaces_between_special_tokens": False},
        "a cut prompt": {"truncate_prompt_tokens": 24},
        "two greedy answers": {"n": 2},
        "beams": {"use_beam_search": True, "n": 2, "max_tokens": 8},
        "a stream": {"stream": True, "stream_options": {"include_usage": True}},
        "a stream with logprobs": {"stream": True, "logprobs": 2},
        "token ids": {"return_token_ids": True},
        "a salt": {"cache_salt": "somebody"},
        "urgent": {"priority": -5},
        "patient": {"priority": 5},
        "min_p": {"min_p": 0.2},
        "too many logprobs": {"logprobs": 1000},
        **FORMATS,
    }
    for name, family in families.items():
        for number in range(3):
            text = texts[(number * 2 + len(name)) % len(texts)]
            yield f"{name} {number}", ("completions", {"prompt": text, "temperature": 0, "max_tokens": 24} | family)
    for number in range(6):  # stop tokens before, at and behind the least length
        stops = {"stop_token_ids": [*range(60 * number, 60 * number + 60)], "min_tokens": 3 + 2 * number, "logprobs": 1}
        yield f"stop tokens {number}", ("completions", {"prompt": texts[number], "temperature": 0, "max_tokens": 32} | stops)
    yield "many prompts", ("completions", {"prompt": texts[:4], "temperature": 0, "max_tokens": 16})
    yield "prompts of ids", ("completions", {"prompt": [[5, 9, 300, 41], [7]], "temperature": 0, "max_tokens": 16})
    yield "too long", ("completions", {"prompt": texts[4] * 9, "temperature": 0})
    chats: dict[str, dict[str, Any]] = {
        "chat": {},
        "chat with logprobs": {"logprobs": True, "top_logprobs": 3},
        "chat that goes on": {"continue_final_message": True, "add_generation_prompt": False},
        "chat in json": {"response_format": {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}},
        "chat with a stop": {"stop": ["\n"]},
        "chat as a stream": {"stream": True, "stream_options": {"include_usage": True}},
    }
    for name, family in chats.items():
        for number in range(2):
            said = [{"role": "user", "content": texts[1]}, {"role": "assistant", "content": texts[2 + number]}]
            yield (
                f"{name} {number}",
                ("chat/completions", {"messages": said, "temperature": 0, "max_completion_tokens": 24} | family),
            )
    for number in range(2):
        yield f"response {number}", ("responses", {"input": texts[3 - number], "temperature": 0, "max_output_tokens": 24})


def seeded(texts: list[str]) -> Iterator[tuple[str, Case]]:
    """By name, what the same server answers alike without drafts."""
    families: dict[str, dict[str, Any]] = {
        "bare": {},
        "top_p": {"top_p": 0.9},
        "top_k": {"top_k": 20},
        "min_p": {"min_p": 0.1},
        "penalties": {"presence_penalty": 0.8, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
        "bias": {"logit_bias": {"300": 3.0, "13": -100.0}},
        "logprobs": {"logprobs": 3},
        "three answers": {"n": 3, "max_tokens": 12},
        "a stop": {"stop": ["\n", "("], "include_stop_str_in_output": True},
        "a least length": {"min_tokens": 9, "stop_token_ids": [*range(100)]},
        "a stream": {"stream": True, "logprobs": 1},
        "allowed tokens": {"allowed_token_ids": [*range(20, 400)], "top_p": 0.95},
        "bad words": {"bad_words": ["self", " return"]},
        "a chat": {},
        **FORMATS,
    }
    for number, (name, family) in enumerate(families.items()):
        for temperature in (0.3, 0.7, 1.0, 1.5):
            body = {"temperature": temperature, "seed": 1000 * number + int(10 * temperature), "max_tokens": 24} | family
            text = texts[number % len(texts)]
            if name == "a chat":
                yield f"{name} at {temperature}", ("chat/completions", {"messages": [{"role": "user", "content": text}]} | body)
            else:
                yield f"{name} at {temperature}", ("completions", {"prompt": text} | body)


def ask_all(server: Server, cases: dict[str, Case], order: int, num_at_once: int = 8) -> dict[str, Any]:
    """The answers by name, asked for in an order of its own."""
    names = sorted(cases)
    random.Random(order).shuffle(names)
    with httpx.Client(base_url=f"{server.url}/v1/", timeout=120) as client, ThreadPoolExecutor(num_at_once) as threads:
        return dict(zip(names, threads.map(lambda name: _ask(client, *cases[name]), names), strict=True))


def _ask(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = client.post(path, json={"model": "target", **body})
    if not body.get("stream"):
        return answer.status_code, _alike(answer.json())
    # How the text falls into pieces depends on what is accepted.
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    whole: dict[str, Any] = {"usage": chunks[-1].get("usage"), "text": "", "tokens": [], "logprobs": [], "ended": []}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        whole["text"] += choice.get("text") or choice.get("delta", {}).get("content") or ""
        logprobs = choice.get("logprobs") or {}
        whole["tokens"] += logprobs.get("tokens", [])
        whole["logprobs"] += logprobs.get("token_logprobs", [])
        whole["ended"] += filter(None, [choice.get("finish_reason")])
    return answer.status_code, _alike(whole)


def _alike(value: Any) -> Any:
    """Without what is another one in each answer."""
    if isinstance(value, dict):
        return {key: _alike(below) for key, below in value.items() if key not in UNLIKE}
    return [_alike(below) for below in value] if isinstance(value, list) else value


def differences(left: Any, right: Any, path: str = "") -> Iterator[str]:
    """Where two answers differ, but for what a sum in another order explains."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        for key in left:
            yield from differences(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        for place, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from differences(one, other, f"{path}[{place}]")
    elif isinstance(left, float) and isinstance(right, float):
        if abs(left - right) > LOGPROB_TOLERANCE:
            yield f"{path}: {left} and {right}"
    elif left != right:
        yield f"{path}: {left!r} and {right!r}"


def check(expected: dict[str, Any], found: dict[str, Any]) -> None:
    unlike = {name: [*differences(expected[name], found[name])][:3] for name in expected}
    unlike = {name: told for name, told in unlike.items() if told}
    assert not unlike, json.dumps(unlike, indent=1)


def metric(server: Server, name: str) -> float:
    """One of ours; of all sources together."""
    return sum(value for key, value in counters(server.metrics()).items() if key.startswith(f"vllm:double_{name}"))


def accepted(server: Server) -> float:
    return metric(server, "accepted_tokens")


def test_greedy_requests_are_answered_as_by_plain_vllm(servers: tuple[Server, Server], texts: list[str]) -> None:
    ours = servers[1]
    cases = dict(greedy(texts))
    assert len(cases) >= 100
    with ThreadPoolExecutor(2) as threads:
        expected, found = threads.map(ask_all, servers, (cases, cases), (1, 2))
    check(expected, found)
    refused = {name: told for name, (status, told) in found.items() if status != 200}
    assert {name[:-2] for name in refused} == {"two greedy answers", "too many logprobs", "too lo"}, refused
    assert accepted(ours) > 50


def test_logprobs_of_given_tokens_are_those_of_plain_vllm(servers: tuple[Server, Server], texts: list[str]) -> None:
    """One after another: beside such a request vLLM gives the others too few logprobs, with and without drafts."""
    body = {"temperature": 0, "max_tokens": 24, "logprobs": 1, "logprob_token_ids": [5, 9, 300]}
    cases: dict[str, Case] = {str(number): ("completions", {"prompt": text} | body) for number, text in enumerate(texts)}
    plain, ours = (ask_all(server, cases, 5, num_at_once=1) for server in servers)
    check(plain, ours)
    assert all(status == 200 for status, _ in ours.values())


def test_seeded_requests_are_answered_as_without_drafts(servers: tuple[Server, Server], texts: list[str]) -> None:
    ours = servers[1]
    cases = dict(seeded(texts))
    assert len(cases) >= 60
    expected = ask_all(ours, {name: (path, body | DECLINED) for name, (path, body) in cases.items()}, 3)
    before = accepted(ours)
    found = ask_all(ours, cases, 4)
    check(expected, found)
    assert all(status == 200 for status, _ in found.values())
    assert accepted(ours) > before + 100
