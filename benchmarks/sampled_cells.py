"""What sampled parity compares: temperatures times conditions, and the prompts that each such cell gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from benchmarks.client import Request

__all__ = ["CONDITIONS", "Cell", "as_tokens", "cells_of", "children", "requests_of", "split"]

CONDITIONS: dict[str, dict[str, float]] = {
    "bare": {},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 20},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2},
}


@dataclass(frozen=True)
class Cell:
    """A temperature and the name of a condition."""

    temperature: float
    condition: str


def cells_of(temperatures: Sequence[float], conditions: Sequence[str]) -> list[Cell]:
    """Every condition at every temperature."""
    return [Cell(temperature, condition) for temperature in temperatures for condition in conditions]


def split(num_prompts: int, num_cells: int, per_cell: int) -> list[list[int]]:
    """The prompts of every cell: ``per_cell`` consecutive ones, round and round. ValueError if some prompt is left out."""
    if not 0 < per_cell <= num_prompts:
        raise ValueError(f"a cell cannot get {per_cell} of {num_prompts} prompts")
    if num_cells * per_cell < num_prompts:
        raise ValueError(f"{num_cells} cells of {per_cell} prompts leave out some of {num_prompts}")
    return [[(cell * per_cell + place) % num_prompts for place in range(per_cell)] for cell in range(num_cells)]


def as_tokens(requests: Sequence[Request], tokenizer: Tokenizer) -> list[Request]:
    """The same requests with token ids for prompts: the positions of what is drawn are then known."""
    return [
        replace(request, prompt=tuple(tokenizer.encode(request.prompt, add_special_tokens=False).ids))
        if isinstance(request.prompt, str)
        else request
        for request in requests
    ]


def requests_of(prompts: Sequence[Request], cell: Cell, chosen: Sequence[int], seed: int) -> list[Request]:
    """The requests of a cell; the prompt at an index has the seed ``seed`` + index."""
    sampling = CONDITIONS[cell.condition]
    return [
        replace(prompts[index], temperature=cell.temperature, seed=seed + index, **sampling)  # type: ignore[arg-type]
        for index in chosen
    ]


def children(request: Request, n: int) -> list[Request]:
    """The requests that vLLM makes of one with ``n`` texts: their seeds follow each other. ValueError without a seed."""
    if request.seed is None:
        raise ValueError(f"{request.id} has no seed")
    return [replace(request, id=f"{request.id}/{child}", seed=request.seed + child) for child in range(n)]
