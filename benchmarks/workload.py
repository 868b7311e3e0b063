"""What is asked of the servers: the bundled pair, inflated targets, and held-out prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.client import Request
from benchmarks.machine import ROOT

__all__ = [
    "DRAFT",
    "PROMPTS",
    "TARGET",
    "Prompt",
    "count_layers",
    "inflated",
    "load_prompts",
    "requests",
    "to_the_limit",
]

PAIR = ROOT / "benchmarks" / "pair"
TARGET, DRAFT, PROMPTS = PAIR / "target", PAIR / "draft", PAIR / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt: where it comes from and its text."""

    id: str
    kind: str
    text: str


def load_prompts(path: Path, count: int, kinds: Sequence[str] = ()) -> list[Prompt]:
    """``count`` prompts, mixed as the file's kinds are; ValueError when there are not so many."""
    by_kind: dict[str, list[Prompt]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if not kinds or entry["kind"] in kinds:
            by_kind.setdefault(entry["kind"], []).append(Prompt(entry["id"], entry["kind"], entry["prompt"]))
    places = [((index + 0.5) / len(prompts), prompt) for prompts in by_kind.values() for index, prompt in enumerate(prompts)]
    found = [prompt for _, prompt in sorted(places, key=lambda place: place[0])]
    if len(found) < count:
        raise ValueError(f"{path.name} has {len(found)} such prompts, {count} are wanted")
    return found[:count]


def requests(
    prompts: Sequence[Prompt],
    max_tokens: int,
    temperature: float,
    *,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
) -> list[Request]:
    """One request per prompt, whose seed is ``seed`` plus its index."""
    return [
        Request(
            prompt.id,
            prompt.text,
            max_tokens,
            temperature,
            top_p=top_p,
            top_k=top_k,
            seed=None if seed is None else seed + index,
        )
        for index, prompt in enumerate(prompts)
    ]


def to_the_limit(prompts: Sequence[Prompt], target: Path, max_model_len: int, max_tokens: int) -> list[Request]:
    """Requests whose text ends exactly at ``max_model_len``: prompts laid end to end, past EOS if need be."""
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    tokens: list[int] = []
    for prompt in prompts:
        tokens += tokenizer.encode(prompt.text, add_special_tokens=False).ids
    length = max_model_len - max_tokens
    found = []
    for index, prompt in enumerate(prompts):
        start = index * len(tokens) // len(prompts)
        rotated = tokens[start:] + tokens[:start]
        rotated *= -(-length // len(rotated))
        found.append(Request(f"{prompt.id}/limit", tuple(rotated[:length]), max_tokens, ignore_eos=True))
    return found


def count_layers(model: Path) -> int:
    """Decoder layers of a model."""
    return int(json.loads((model / "config.json").read_text())["num_hidden_layers"])


def inflated(target: Path, layers: int, folder: Path) -> Path:
    """The target with ``layers`` layers and the same function, written below ``folder``."""
    if layers == count_layers(target):
        return target
    output = folder / f"target-{layers}"
    if not (output / "config.json").exists():
        command = [sys.executable, str(PAIR / "inflate.py"), "--source", str(target), "--output", str(output)]
        subprocess.run([*command, "--layers", str(layers)], check=True, stdout=subprocess.DEVNULL)
    return output
