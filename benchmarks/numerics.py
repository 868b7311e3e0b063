"""Whether texts that differ from plain vLLM's differ by rounding alone.

    python -m benchmarks.parity --dtype bfloat16 --divergences divergences.jsonl ...
    python -m benchmarks.numerics --divergences divergences.jsonl --dtype bfloat16

A forward of one token and a forward of 1 + k tokens round differently. On the same, given texts (teacher forcing) both kinds of
forward give logits at the same places; the 99.9th percentile of their absolute difference is the noise. At every first
difference of two texts the target's two best logits have to lie within it. The exit status is 1 otherwise.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from benchmarks import rows, workload

__all__ = ["LogitReader", "main", "noise_bound"]

Logits = npt.NDArray[np.float32]
QUANTILE = 0.999


class LogitReader:
    """The target on vLLM's own kernels, outside an engine: logits at given places of given texts."""

    def __init__(self, target: Path, dtype: str, max_model_len: int) -> None:
        from vllm_double.draft.engine.vllm_engine import EngineConfig, VllmDraftEngine

        self._engine = VllmDraftEngine(EngineConfig(str(target), dtype=dtype, max_model_len=max_model_len))
        self._captured: list[Any] = []
        model, captured = self._engine._model, self._captured
        original = model.compute_logits

        def compute_logits(*args: Any) -> Any:
            logits = original(*args)
            captured.append(logits.float().numpy().copy())
            return logits

        model.compute_logits = compute_logits

    def read(self, texts: Sequence[tuple[list[int], int]], chunk: int) -> list[Logits]:
        """For every (text, first): logits float32 [len(text) - first, vocab] behind tokens first.. of the text.

        All texts are read side by side, ``chunk`` tokens of each a forward, as a batch is.
        """
        from vllm_double.draft.engine.base import Batch, Row

        size = self._engine.page_size
        pages, free = [], 1
        for text, first in texts:
            pages.append(range(free, free + 1 + len(text) // size))
            free = pages[-1].stop
            self._engine.forward(Batch.of([Row(pages[-1], 0, text[:first], 0, 0.0)]), 1)
        parts: list[list[Logits]] = [[] for _ in texts]
        for step in range(0, max(len(text) - first for text, first in texts), chunk):
            taken = []
            for index, (text, first) in enumerate(texts):
                if tokens := text[first + step : first + step + chunk]:
                    taken.append((index, Row(pages[index], first + step, tokens, len(tokens), 0.0)))
            self._captured.clear()
            self._engine.forward(Batch.of([row for _, row in taken]), 1)
            logits, start = np.concatenate(self._captured), 0
            for index, row in taken:
                parts[index].append(logits[start : start + row.num_outputs])
                start += row.num_outputs
        return [np.concatenate(part) for part in parts]


def noise(reader: LogitReader, texts: Sequence[tuple[list[int], int]], chunk: int, batch: int) -> npt.NDArray[np.float32]:
    """Absolute differences of all logits at all places between forwards of ``batch`` texts by one and by ``chunk`` tokens."""
    parts = []
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        for one, several in zip(reader.read(some, 1), reader.read(some, chunk), strict=True):
            parts.append(np.abs(one - several).ravel())
    return np.concatenate(parts)


def long_texts(
    tokenizer: Tokenizer, prompts: Sequence[workload.Prompt], count: int, length: int
) -> list[tuple[list[int], int]]:
    """(text, first place to look at) as long as the model reads: rounding errors grow along a text."""
    texts: list[tuple[list[int], int]] = []
    text: list[int] = []
    for prompt in itertools.cycle(prompts):
        text += tokenizer.encode(prompt.text, add_special_tokens=False).ids
        if len(text) >= length:
            texts.append((text[:length], length // 4))
            text = []
        if len(texts) == count:
            return texts
    raise ValueError("there are no prompts")


def noise_bound(
    reader: LogitReader, target: Path, prompts: Path, max_model_len: int, k: int, batch: int, num_texts: int
) -> float:
    """The 99.9th percentile of ``noise`` on long texts."""
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    texts = long_texts(tokenizer, workload.load_prompts(prompts, 128), num_texts, max_model_len - 1)
    return float(np.quantile(noise(reader, texts, 1 + k, batch), QUANTILE))


def main(argv: Sequence[str] | None = None) -> int:
    """Appends one row; 0 if rounding explains every difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divergences", type=Path, required=True, help="what benchmarks.parity wrote")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="texts in a forward, as many as benchmarks.parity had requests")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="as many as plain vLLM's forwards have")
    parser.add_argument("--num-texts", type=int, default=16, help="texts from which the noise is measured")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--target", type=Path, default=workload.TARGET)
    parser.add_argument("--prompts", type=Path, default=workload.PROMPTS)
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "numerics.csv")
    options = parser.parse_args(argv)
    tokenizer = Tokenizer.from_file(str(options.target / "tokenizer.json"))
    reader = LogitReader(options.target, options.dtype, options.max_model_len)
    torch.set_num_threads(options.threads)
    texts = long_texts(tokenizer, workload.load_prompts(options.prompts, 128), options.num_texts, options.max_model_len - 1)
    differences = noise(reader, texts, 1 + options.k, options.batch)
    bound = float(np.quantile(differences, QUANTILE))
    gaps = []
    for line in options.divergences.read_text().splitlines():
        entry = json.loads(line)
        prompt = entry["prompt"]
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids if isinstance(prompt, str) else prompt
        text = [*ids, *entry["common"]]
        # As plain vLLM comes there: the prompt in one forward, and then token by token.
        best = np.sort(reader.read([(text, len(ids))], 1)[0][-1])[-2:]
        gaps.append(float(best[1] - best[0]))
    ok = all(gap <= bound for gap in gaps)
    row: dict[str, rows.Value] = {
        "dtype": options.dtype,
        "k": options.k,
        "batch": options.batch,
        "threads": options.threads,
        "texts": len(texts),
        "noise_p999": bound,
        "noise_max": float(differences.max()),
        "divergences": len(gaps),
        "largest_gap": max(gaps, default=0.0),
        "ok": ok,
    }
    print(row, flush=True)
    rows.append(options.output, row | rows.provenance("benchmarks.numerics"))
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
