"""Sampled text of a double server with drafts against the same server's without, token by token.

    python -m benchmarks.parity --sampled --num-prompts 128 --max-tokens 256 --batch 1 8

With a seed the text is a function of prompt, parameters and seed alone. A cell is a temperature and a condition; each
gets ``--per-cell`` of the prompts at each batch size. Then n = 4 with a seed, twice. A difference is explained if both
tokens' scores (benchmarks.draw_scores) lie within the noise of the forward (benchmarks.numerics). The exit status is 1
if one is not, if two of four texts are the same, if no draft was accepted, or if a request was drafted for that declined.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks import draw_scores, rows, workload
from benchmarks.arms import Arm, Choices, variants
from benchmarks.client import Completion, Request, Round, choices
from benchmarks.harness import Fleet
from benchmarks.metrics import counters, growth, speculation
from benchmarks.parity import divergences, parity_row, workload_of
from benchmarks.sampled_cells import Cell, as_tokens, cells_of, children, requests_of, split
from benchmarks.server import Server, ServerConfig

__all__ = ["Judgement", "SampledParity", "judge", "sampled_parity"]

NUM_CHOICES = 4
DRAFTED, ACCEPTED = "vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"


@dataclass(frozen=True)
class Judgement:
    """Of one first difference: how far apart the two scores are, and what rounding may do, both in logits.

    gap: of scores, times T; None if the texts or their ends differ, but no token. noise: None if there is no gap.
    """

    id: str
    position: int
    gap: float | None
    noise: float | None

    @property
    def is_explained(self) -> bool:
        """Whether rounding alone may have decided between the two tokens."""
        return self.gap is not None and self.noise is not None and self.gap <= self.noise


def judge(
    different: Sequence[Mapping[str, object]],
    requests: Sequence[Request],
    read: Callable[[Request, Sequence[int]], draw_scores.Floats],
    noise: Callable[[], float],
) -> list[Judgement]:
    """Judges what ``divergences`` found.

    read: raw logits behind a request's prompt and some output. noise: the noise of the forward, asked for where there is a gap.
    """
    by_id = {request.id: request for request in requests}
    found = []
    for one in different:
        request, common = by_id[str(one["id"])], list(one["common"])  # type: ignore[call-overload]
        drawn: list[int] = [*one["plain"], *one["double"]]  # type: ignore[misc]
        if len(drawn) < 2:
            found.append(Judgement(request.id, len(common), None, None))
            continue
        prompt = _tokens(request)
        scores = draw_scores.scores(read(request, common), request, prompt, common)
        gap = draw_scores.gap(scores, drawn) * request.temperature
        found.append(Judgement(request.id, len(common), gap, noise()))
    return found


def raw_logits(url: str, request: Request, common: Sequence[int], vocab: int) -> draw_scores.Floats:
    """The server's raw logits float32 [vocab] behind the prompt and ``common``, by a forward without drafts."""
    plain = Request(request.id, (*_tokens(request), *common), 1, drafts=False)
    (choice,) = choices(url, plain, logprobs=vocab, return_tokens_as_token_ids=True)
    found = np.full(vocab, -np.inf, np.float32)
    for name, value in choice["logprobs"]["top_logprobs"][0].items():
        found[int(name.removeprefix("token_id:"))] = value
    return found


def ask_several(url: str, requests: Sequence[Request], n: int) -> Round:
    """``n`` texts of every request, one request after the other; the completions are those of ``children``."""
    start = time.perf_counter()
    found = [
        Completion(child.id, choice["token_ids"], choice["text"], choice["finish_reason"])
        for request in requests
        for child, choice in zip(children(request, n), choices(url, request, n=n), strict=True)
    ]
    return Round(found, time.perf_counter() - start)


def num_equal_pairs(completions: Sequence[Completion], n: int) -> int:
    """Pairs of equal texts among each ``n`` completions of one request."""
    groups = [completions[start : start + n] for start in range(0, len(completions), n)]
    return sum(a.tokens == b.tokens for group in groups for a, b in itertools.combinations(group, 2))


def _tokens(request: Request) -> tuple[int, ...]:
    if isinstance(request.prompt, str):
        raise TypeError(f"{request.id}: a prompt of token ids is needed")
    return request.prompt


@dataclass
class SampledParity:
    """The comparisons on one server, and what they have shown so far.

    equal_pairs: pairs of equal texts among the four of one request. declined_drafts: draft tokens verified for requests
    that declined drafts.
    """

    options: argparse.Namespace
    arm: Arm
    layers: int
    target: Path
    server: Server
    differences: list[Judgement] = field(default_factory=list)
    accepted: float = 0.0
    declined_drafts: float = 0.0
    equal_pairs: int = 0

    def __post_init__(self) -> None:
        self._vocab = int(json.loads((self.target / "config.json").read_text())["vocab_size"])
        self._noise = functools.cache(functools.partial(forward_noise, self.options, self.target))

    def measured(self, play: Callable[[], Round]) -> tuple[Round, dict[str, float]]:
        """A round, and what the server's counters grew by in it."""
        before = counters(self.server.metrics())
        round_ = play()
        return round_, growth(before, counters(self.server.metrics()))

    def compare(
        self, cell: Cell, batch: int, requests: Sequence[Request], declined: Round, drafted: Round, grown: Mapping[str, float]
    ) -> None:
        """Judges and reports the texts of one cell; appends its row. grown: counters, in the round with drafts."""
        different = divergences(requests, declined.completions, drafted.completions)
        judged = judge(different, requests, self._read, self._noise)
        self.differences += judged
        self.accepted += grown.get(ACCEPTED, 0.0)
        row = parity_row(self.options, self.arm, self.layers, batch, declined, drafted, different)
        spent = speculation(grown)
        row |= sampled_columns(cell, self.options.seed, judged)
        row |= {"tokens_per_forward": spent.tokens_per_forward, "acceptance": spent.acceptance}
        rows.append(self.options.output, row | rows.provenance("benchmarks.parity"))
        print(
            f"T={cell.temperature:g} {cell.condition:<9} batch {batch}: {len(requests) - len(judged)} of {len(requests)} "
            f"texts identical; {drafted.tokens} tokens, {drafted.tokens_per_second:.0f}/s, "
            f"{declined.tokens_per_second:.0f}/s without drafts",
            flush=True,
        )
        for one in judged:
            print(f"  {one}, {'explained' if one.is_explained else 'NOT EXPLAINED'} by rounding", flush=True)
        if self.options.divergences is not None:
            with self.options.divergences.open("a") as file:
                place = {"batch": batch, "temperature": cell.temperature, "condition": cell.condition}
                file.writelines(json.dumps(place | one) + "\n" for one in different)

    def cells(self, fleet: Fleet, texts: Sequence[Request]) -> None:
        """All conditions at all temperatures and batch sizes."""
        cells = cells_of(self.options.temperature, self.options.conditions)
        chosen = split(len(texts), len(cells), self.options.per_cell)
        for batch in self.options.batch:
            for cell, indices in zip(cells, chosen, strict=True):
                requests = requests_of(texts, cell, indices, self.options.seed)
                without = [replace(request, drafts=False) for request in requests]
                declined, grown = self.measured(functools.partial(fleet.ask, self.arm, without, batch))
                self.declined_drafts += grown.get(DRAFTED, 0.0)
                drafted, grown = self.measured(functools.partial(fleet.ask, self.arm, requests, batch))
                self.compare(cell, batch, requests, declined, drafted, grown)

    def several(self, texts: Sequence[Request]) -> None:
        """n = 4 at all temperatures: without drafts, and twice with them."""
        for temperature in self.options.temperature:
            bare = Cell(temperature, "bare")
            requests = requests_of(texts, bare, range(self.options.num_several), self.options.seed)
            every = [child for request in requests for child in children(request, NUM_CHOICES)]
            without = [replace(request, drafts=False) for request in requests]
            declined, grown = self.measured(lambda: ask_several(self.server.url, without, NUM_CHOICES))  # noqa: B023
            self.declined_drafts += grown.get(DRAFTED, 0.0)
            for again in ("", " again"):
                drafted, grown = self.measured(lambda: ask_several(self.server.url, requests, NUM_CHOICES))  # noqa: B023
                self.equal_pairs += num_equal_pairs(drafted.completions, NUM_CHOICES)
                self.compare(Cell(temperature, f"n={NUM_CHOICES}{again}"), NUM_CHOICES, every, declined, drafted, grown)

    def _read(self, request: Request, common: Sequence[int]) -> draw_scores.Floats:
        return raw_logits(self.server.url, request, common, self._vocab)

    @property
    def failed(self) -> bool:
        """Whether something is wrong, or nothing was compared."""
        unexplained = any(not one.is_explained for one in self.differences)
        return bool(unexplained or self.equal_pairs or self.declined_drafts or not self.accepted)

    def __str__(self) -> str:
        unexplained = sum(not one.is_explained for one in self.differences)
        return (
            f"{len(self.differences)} first differences, {unexplained} not explained by rounding; "
            f"{self.equal_pairs} equal pairs of texts with n={NUM_CHOICES}; {self.accepted:.0f} draft tokens accepted, "
            f"{self.declined_drafts:.0f} verified for requests that declined them"
        )


def sampled_columns(cell: Cell, seed: int, judged: Sequence[Judgement]) -> dict[str, rows.Value]:
    """The columns that a row of greedy parity leaves empty. gaps: null where no token differs."""
    gaps = [one.gap for one in judged]
    return {
        "temperature": cell.temperature,
        "condition": cell.condition,
        "seed": seed,
        "gaps": json.dumps([f"{gap}" if gap == math.inf else gap for gap in gaps]),
        "largest_gap": max((gap for gap in gaps if gap is not None), default=None),
        "noise_p999": max((one.noise for one in judged if one.noise is not None), default=None),
        "explained": sum(one.is_explained for one in judged),
    }


def sampled_parity(options: argparse.Namespace) -> int:
    """All comparisons on one server; 1 if something is wrong."""
    every = tuple(options.cores)
    (arm,) = variants(options.arm, Choices(options.draft, every, (options.k,), (options.k,), (options.k,)))
    prompts = workload.load_prompts(options.prompts, options.num_prompts)
    tokenizer = Tokenizer.from_file(str(options.target / "tokenizer.json"))
    vocab = int(json.loads((options.target / "config.json").read_text())["vocab_size"])
    with tempfile.TemporaryDirectory(prefix="vllm-double-parity-") as folder:
        layers = options.layers or workload.count_layers(options.target)
        target = workload.inflated(options.target, layers, Path(folder))
        known = workload_of(prompts, target, options.max_model_len, options.max_tokens, options.num_limit)
        texts = as_tokens(known, tokenizer)
        # Raw logits, all of them: penalties and filters are applied anew where two texts part.
        extra = ("--logprobs-mode", "raw_logits", "--max-logprobs", str(vocab))
        base = ServerConfig(target, every, dtype=options.dtype, max_model_len=options.max_model_len, extra=extra)
        with Fleet([arm], base, Path(folder)) as fleet:
            parity = SampledParity(options, arm, layers, target, fleet.server(arm))
            parity.cells(fleet, texts)
            parity.several(texts)
    print(parity, flush=True)
    return int(parity.failed)


def forward_noise(options: argparse.Namespace, target: Path) -> float:
    """How far a forward's logits may be off: the 99.9th percentile, as benchmarks.numerics measures it.

    Of one text at a time, whatever the batch: the last texts of a round are alone, and several differ less. With all cores:
    with one, vLLM's kernels sum in the same order for one token and for several, and differ in nothing.
    """
    import torch

    from benchmarks.numerics import LogitReader, noise_bound

    reader = LogitReader(target, options.dtype, options.max_model_len)
    torch.set_num_threads(len(options.cores))
    return noise_bound(reader, target, options.prompts, options.max_model_len, options.k, batch=1, num_texts=4)
