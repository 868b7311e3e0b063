"""The arms of a comparison: how each is configured, and which variants of it are tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.machine import has_cuda

__all__ = ["ARMS", "OTHERS", "WARM", "Arm", "Choices", "default_arms", "variants"]


_SUFFIX_K = 24  # vLLM's default


@dataclass(frozen=True)
class Arm:
    """One way to serve: a name, the value of --speculative-config, and threads (None: not set)."""

    name: str
    speculative: dict[str, object] | None = None
    threads: str | None = None

    @property
    def label(self) -> str:
        """Name, chain length and threads: unique among the variants of one arm."""
        parts = [self.name]
        if self.speculative is not None:
            parts.append(f"k{self.speculative['num_speculative_tokens']}")
        if self.threads is not None:
            parts.append(f"threads {self.threads}")
        return " ".join(parts)


@dataclass(frozen=True)
class Choices:
    """What the variants are made from: the draft model, chain lengths, and the cores that every arm gets."""

    draft: Path
    cores: tuple[int, ...]
    ngram_k: tuple[int, ...] = (2, 4, 6)
    draft_k: tuple[int, ...] = (2, 3, 4)
    double_k: tuple[int, ...] = (16,)
    threads: tuple[str, ...] = ()  # thread splits of the baselines; () tries all

    @property
    def splits(self) -> tuple[str | None, ...]:
        """Thread splits of a baseline: all cores, and all but the last (left to the API server)."""
        if has_cuda():
            return (None,)
        if self.threads:
            return self.threads
        every = ",".join(map(str, self.cores))
        return (every, ",".join(map(str, self.cores[:-1]))) if len(self.cores) > 1 else (every,)


def _double(choices: Choices, with_draft: bool = True, **settings: object) -> list[dict[str, object] | None]:
    model: dict[str, object] = {"model": str(choices.draft)} if with_draft else {}
    return [
        {"method": "double", "num_speculative_tokens": k} | model | ({"double": settings} if settings else {})
        for k in choices.double_k
    ]


def _ngram(choices: Choices) -> list[dict[str, object] | None]:
    return [
        {"method": "ngram", "num_speculative_tokens": k, "prompt_lookup_max": 5, "prompt_lookup_min": 2}
        for k in choices.ngram_k
    ]


def _draft_model(choices: Choices, **settings: object) -> list[dict[str, object] | None]:
    return [
        {"method": "draft_model", "model": str(choices.draft), "num_speculative_tokens": k} | settings for k in choices.draft_k
    ]


def _suffix(choices: Choices, **settings: object) -> list[dict[str, object] | None]:
    lengths = sorted({max(choices.double_k), _SUFFIX_K})
    return [{"method": "suffix", "num_speculative_tokens": k} | settings for k in lengths]


OTHERS = ("ngram", "draft_model", "draft_model-probabilistic", "suffix")
"""vLLM's own methods with cold caches: the best of them is what double is compared with."""

WARM = ("suffix-warm", "double-warm")
"""Arms that keep what they answered, so that from the second round on they have seen every answer."""

ARMS: dict[str, Callable[[Choices], list[dict[str, object] | None]]] = {
    "plain": lambda choices: [None],
    "plain-again": lambda choices: [None],
    "ngram": _ngram,
    "draft_model": _draft_model,
    # Drafts are drawn, and accepted by a ratio of probabilities. Needs the standard rejection sampler, vLLM's default,
    # and one vocabulary for both models. At T = 0 it is draft_model.
    "draft_model-probabilistic": lambda choices: _draft_model(choices, draft_sample_method="probabilistic"),
    "suffix": lambda choices: _suffix(choices, suffix_decoding_max_cached_requests=0),
    "suffix-warm": _suffix,
    "double": _double,
    "double-without-retrieval": lambda choices: _double(choices, target_retrieval=False, draft_retrieval=False),
    "double-target-side": lambda choices: _double(choices, draft_retrieval=False),
    "double-draft-side": lambda choices: _double(choices, target_retrieval=False),
    "double-without-waiting": lambda choices: _double(choices, wait_for_draft=False),
    "double-one-path": lambda choices: _double(choices, children_per_node=1, target_retrieval=False, draft_retrieval=False),
    "double-without-coverage": lambda choices: _double(choices, children_per_node=1),
    "double-retrieval-only": lambda choices: _double(choices, with_draft=False),
    "double-warm": lambda choices: _double(choices, share_history=True),
    "double-switched-off": lambda choices: _double(choices, enabled=False),
}


def default_arms(sampled: bool = False) -> list[str]:
    """The arms of `make bench`: suffix if arctic-inference is installed, drawn drafts if some temperature is above 0."""
    drawn = ["draft_model-probabilistic"] if sampled else []
    suffix = ["suffix"] if find_spec("arctic_inference") is not None else []
    return ["plain", "ngram", "draft_model", *drawn, *suffix, "double"]


def variants(name: str, choices: Choices) -> list[Arm]:
    """All variants of an arm to choose the best from: chain lengths times thread splits.

    Double splits the cores itself, its target and its draft share none; switched off it is plain vLLM, which does not.
    ValueError for an unknown arm.
    """
    if name not in ARMS:
        raise ValueError(f"no arm {name!r}; there are {', '.join(ARMS)}")
    splits_itself = name.startswith("double") and name != "double-switched-off"
    splits: Sequence[str | None] = (None,) if splits_itself else choices.splits
    return [Arm(name, speculative, split) for speculative in ARMS[name](choices) for split in splits]
