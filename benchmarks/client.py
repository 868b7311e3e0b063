"""Streams completions from a server and keeps what a comparison needs: tokens, text and times."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

__all__ = ["Completion", "Request", "Round", "arrive", "choices", "complete", "play"]

_OPTIONAL = ("top_p", "top_k", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty")


@dataclass(frozen=True)
class Request:
    """One completion to ask for; the prompt is text or token ids."""

    id: str
    prompt: str | tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = False
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    drafts: bool = True

    def body(self) -> dict[str, object]:
        """The JSON body. A parameter that is None is left out; ``drafts`` False declines the drafts of method double."""
        body: dict[str, object] = {
            "model": "target",
            "prompt": self.prompt if isinstance(self.prompt, str) else list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "return_token_ids": True,
        }
        given = {name: getattr(self, name) for name in _OPTIONAL}
        body |= {name: value for name, value in given.items() if value is not None}
        if not self.drafts:
            body["vllm_xargs"] = {"double": json.dumps({"enabled": False})}
        return body


@dataclass
class Completion:
    """What came back: token ids, text, why it ended, and when (seconds since the request was sent)."""

    id: str
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    first_token_s: float = 0.0
    seconds: float = 0.0
    chunk_s: list[float] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks; without speculation a chunk is one token."""
        return [later - earlier for earlier, later in zip(self.chunk_s, self.chunk_s[1:], strict=False)]


@dataclass(frozen=True)
class Round:
    """All completions of one pass over the requests, in the order of the requests, and its wall time."""

    completions: list[Completion]
    seconds: float

    @property
    def tokens(self) -> int:
        """Generated tokens, end-of-sequence included."""
        return sum(len(completion.tokens) for completion in self.completions)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over wall time."""
        return self.tokens / self.seconds


async def complete(session: aiohttp.ClientSession, url: str, request: Request) -> Completion:
    """Streams one completion; RuntimeError with the server's words when it refuses or breaks off."""
    found = Completion(request.id)
    start = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=request.body()) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{request.id}: HTTP {answer.status}: {(await answer.text())[:500]}")
        async for line in answer.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"{request.id}: {event['error']}")
            for choice in event["choices"]:
                now = time.perf_counter() - start
                ids = choice.get("token_ids") or []
                if ids:
                    found.first_token_s = found.first_token_s or now
                    found.chunk_s.append(now)
                found.tokens += ids
                found.text += choice["text"]
                found.finish_reason = choice.get("finish_reason") or found.finish_reason
    found.seconds = time.perf_counter() - start
    if not found.finish_reason:
        raise RuntimeError(f"{request.id}: the stream ended without a reason after {len(found.tokens)} tokens")
    return found


def choices(url: str, request: Request, **parameters: object) -> list[dict[str, Any]]:
    """The choices of one answer that is not streamed; ``parameters``: more of the body, as ``n`` or ``logprobs``.

    RuntimeError with the server's words when it refuses.
    """
    body = request.body() | {"stream": False} | parameters
    post = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(post, timeout=300) as answer:
            found: list[dict[str, Any]] = json.load(answer)["choices"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{request.id}: HTTP {error.code}: {error.read().decode()[:500]}") from error
    return sorted(found, key=lambda choice: int(choice["index"]))


async def play(
    url: str, requests: Sequence[Request], batch: int, progress: Callable[[Completion], None] | None = None
) -> Round:
    """Runs the requests with ``batch`` of them in flight at any time."""
    completions: list[Completion | None] = [None] * len(requests)
    waiting = iter(range(len(requests)))
    async with _session() as session:

        async def worker() -> None:
            for index in waiting:
                completion = await complete(session, url, requests[index])
                completions[index] = completion
                if progress is not None:
                    progress(completion)

        start = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(batch)))
        seconds = time.perf_counter() - start
    return Round([completion for completion in completions if completion is not None], seconds)


async def arrive(url: str, requests: Sequence[Request], times: Sequence[float]) -> Round:
    """Sends each request at its time, in seconds from the start, whatever is in flight then."""
    async with _session() as session:

        async def one(request: Request, seconds: float) -> Completion:
            await asyncio.sleep(seconds)
            return await complete(session, url, request)

        start = time.perf_counter()
        completions = await asyncio.gather(*(one(*pair) for pair in zip(requests, times, strict=True)))
        return Round(list(completions), time.perf_counter() - start)


def _session() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20)
