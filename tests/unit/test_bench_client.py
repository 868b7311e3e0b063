"""The benchmark's HTTP client against a small server of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from benchmarks.client import Request, Round, arrive, choices, play
from vllm_double.integration.request_args import RequestArgs


@dataclass
class Completions:
    """Streams the prompt's characters back as tokens; keeps count of how many requests are in flight."""

    fault: str = ""
    in_flight: int = 0
    most: int = 0
    bodies: list[dict[str, object]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.fault == "refused":
            return web.json_response({"error": {"message": "too long"}}, status=400)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        response = web.StreamResponse()
        await response.prepare(request)
        prompt = body["prompt"]
        for index, character in enumerate(prompt):
            last = index == len(prompt) - 1 and self.fault != "cut"
            choice = {
                "text": character,
                "token_ids": [ord(character)],
                "finish_reason": "stop" if last else None,
            }
            await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        if self.fault == "error":
            await response.write(b'data: {"error": {"message": "engine died"}}\n\n')
        await response.write(b"data: [DONE]\n\n")
        self.in_flight -= 1
        return response


def run(server: Completions, requests: Sequence[Request], load: int | Sequence[float]) -> Round:
    async def scenario() -> Round:
        app = web.Application()
        app.router.add_post("/v1/completions", server.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            port = runner.addresses[0][1]
            url = f"http://127.0.0.1:{port}"
            return await (play(url, requests, load) if isinstance(load, int) else arrive(url, requests, load))
        finally:
            await runner.cleanup()

    return asyncio.run(scenario())


def test_completions_come_back_in_the_order_of_the_requests_with_tokens_and_text() -> None:
    server = Completions()
    found = run(server, [Request(str(n), "abc" * (n + 1), 8) for n in range(7)], 3)
    assert [completion.id for completion in found.completions] == [str(n) for n in range(7)]
    assert [completion.text for completion in found.completions] == ["abc" * (n + 1) for n in range(7)]
    assert found.completions[1].tokens == [97, 98, 99] * 2
    assert found.tokens == 3 * sum(range(1, 8))
    assert {completion.finish_reason for completion in found.completions} == {"stop"}
    for completion in found.completions:
        assert 0 < completion.first_token_s <= completion.seconds
        assert len(completion.gaps) == len(completion.chunk_s) - 1


@pytest.mark.parametrize("batch", [1, 4])
def test_no_more_than_batch_requests_are_in_flight(batch: int) -> None:
    server = Completions()
    run(server, [Request(str(n), "x" * 50, 8) for n in range(12)], batch)
    assert 1 <= server.most <= batch


def test_requests_are_sent_at_their_times_and_come_back_in_their_order() -> None:
    server = Completions()
    found = run(server, [Request(str(n), "x" * (n + 1), 8) for n in range(3)], [0.2, 0.1, 0.0])
    assert [body["prompt"] for body in server.bodies] == ["xxx", "xx", "x"]
    assert [completion.text for completion in found.completions] == ["x", "xx", "xxx"]
    assert found.seconds >= 0.2 > found.completions[0].seconds  # since it was sent


def test_requests_ask_for_token_ids_and_leave_out_what_is_not_given() -> None:
    server = Completions()
    run(server, [Request("a", "x", 8, temperature=1.0)], 1)
    (body,) = server.bodies
    assert body["return_token_ids"] is True
    assert body["stream"] is True
    assert body["temperature"] == 1.0
    assert not body.keys() & {"seed", "top_p", "top_k", "repetition_penalty", "presence_penalty", "vllm_xargs"}


def test_a_body_carries_sampling_parameters_and_zero_is_one() -> None:
    sampling = {"top_p": 0.9, "top_k": 20, "seed": 0, "presence_penalty": 0.3, "frequency_penalty": 0.0}
    body = Request("a", (1, 2), 8, 0.7, repetition_penalty=1.1, **sampling).body()  # type: ignore[arg-type]
    assert {name: body[name] for name in sampling} == sampling
    assert body["repetition_penalty"] == 1.1
    assert body["prompt"] == [1, 2]


def test_a_request_that_declines_drafts_is_understood_by_the_plug_in() -> None:
    xargs = Request("a", "x", 8, drafts=False).body()["vllm_xargs"]
    assert isinstance(xargs, dict)
    assert RequestArgs.parse(xargs) == RequestArgs(enabled=False)


def test_choices_come_in_the_order_of_their_index_and_a_refusal_raises() -> None:
    async def answer(request: web.Request) -> web.Response:
        body = await request.json()
        if body["stream"] or body["n"] > 2:
            return web.json_response({"error": {"message": "too many"}}, status=400)
        return web.json_response({"choices": [{"index": 1, "token_ids": [8]}, {"index": 0, "token_ids": [7]}]})

    async def scenario() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            found = await asyncio.to_thread(choices, url, Request("a", "x", 8), n=2)
            assert [choice["token_ids"] for choice in found] == [[7], [8]]
            with pytest.raises(RuntimeError, match=r"HTTP 400.*too many"):
                await asyncio.to_thread(choices, url, Request("a", "x", 8), n=3)
        finally:
            await runner.cleanup()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fault", "words"),
    [("refused", "HTTP 400.*too long"), ("error", "engine died"), ("cut", "ended without a reason")],
)
def test_a_failed_request_raises_with_the_servers_words(fault: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        run(Completions(fault), [Request("a", "xy", 8)], 1)
