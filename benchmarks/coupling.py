"""How often a draft at T > 0 names the token that the target draws: by the models' distributions, and in a server.

    python -m benchmarks.coupling
    python -m benchmarks.coupling --target DIR --draft DIR --prompts FILE --no-server

Texts are sampled from the target, and both models give their distributions at every place of them (transformers, float32).
A row of results/coupling.csv for each temperature:
  one_hot        acceptance of the draft's most probable token;
  shared_noise   how often both draw the same token with the same noise;
  optimum        acceptance with the draft's probabilities: 1 - total variation;
  covered_K_noise, covered_K  how often the drawn token is among K of the draft, best by log q + noise, or by q;
  server_...     what a double server counts on the same prompts and temperature, empty where it has no such counter:
                 server_first is how often the first token that the draft listed was drawn, server_covered_3 how often one of
                 the three that the target reads of the list was.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from benchmarks import draw_scores, rows, workload
from benchmarks.arms import Arm, Choices, variants
from benchmarks.client import Request
from benchmarks.harness import Fleet
from benchmarks.machine import cores, parse_cores
from benchmarks.metrics import counters, growth, speculation
from benchmarks.sampled_cells import as_tokens
from benchmarks.server import ServerConfig, exit_on_sigterm

__all__ = ["agreement", "arguments", "columns", "main", "server_columns"]

Floats = npt.NDArray[np.float32]
WITH_NOISE = (4, 8, 16, 32, 64)
WITHOUT_NOISE = (4, 8)
NAMES = (
    "one_hot",
    "shared_noise",
    "optimum",
    *(f"covered_{k}_noise" for k in WITH_NOISE),
    *(f"covered_{k}" for k in WITHOUT_NOISE),
)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=workload.TARGET)
    parser.add_argument("--draft", type=Path, default=workload.DRAFT)
    parser.add_argument("--prompts", type=Path, default=workload.PROMPTS)
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.7, 1.0])
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=8, help="seeds that each place is drawn with")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--no-server", action="store_true", help="the models' distributions only")
    parser.add_argument("--layers", type=int, default=20, help="decoder layers of the server's target: its cost")
    parser.add_argument("--batch", type=int, default=1, help="requests in flight in the server")
    parser.add_argument("--k", type=int, default=16, help="num_speculative_tokens")
    parser.add_argument("--dtype", default="float32", help="of the server")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--cores", type=parse_cores, default=cores())
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "coupling.csv")
    parser.add_argument("--logs", type=Path, default=workload.PAIR.parent / "logs")
    options = parser.parse_args(argv)
    if min(options.temperature) <= 0:
        parser.error("--temperature: nothing is drawn at 0")
    return options


def log_softmax(logits: Floats, temperature: float) -> Floats:
    """Log probabilities float32 [places, vocab]."""
    scaled = logits / np.float32(temperature)
    scaled -= scaled.max(axis=-1, keepdims=True)
    found: Floats = scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    return found


def ranks(keys: Floats, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many tokens of each row have a larger key than the given one, int64 [places]."""
    own = np.take_along_axis(keys, tokens[:, None], axis=-1)
    found: npt.NDArray[np.int64] = (keys > own).sum(axis=-1)
    return found


def agreement(
    target_logits: Floats, draft_logits: Floats, temperature: float, first_position: int, seeds: Sequence[int]
) -> dict[str, float]:
    """Sums over places of the columns NAMES, by logits float32 [places, vocab] at consecutive positions.

    What depends on a draw is averaged over ``seeds``; the rest is exact.
    """
    log_target, log_draft = log_softmax(target_logits, temperature), log_softmax(draft_logits, temperature)
    target_probs, draft_probs = np.exp(log_target), np.exp(log_draft)
    by_draft = np.argsort(-draft_probs, axis=-1, kind="stable")
    mass = np.cumsum(np.take_along_axis(target_probs, by_draft, axis=-1), axis=-1)
    sums = dict.fromkeys(NAMES, 0.0)
    sums["one_hot"] = float(mass[:, 0].sum())
    sums["optimum"] = float(np.minimum(target_probs, draft_probs).sum())
    for k in WITHOUT_NOISE:
        sums[f"covered_{k}"] = float(mass[:, min(k, mass.shape[1]) - 1].sum())
    positions = np.arange(first_position, first_position + len(log_target))
    for seed in seeds:
        noise = draw_scores.noise(np.full(len(positions), seed), positions, log_target.shape[1])
        drawn = (log_target + noise).argmax(axis=-1)
        rank = ranks(log_draft + noise, drawn)
        sums["shared_noise"] += float((rank == 0).sum()) / len(seeds)
        for k in WITH_NOISE:
            sums[f"covered_{k}_noise"] += float((rank < k).sum()) / len(seeds)
    return sums


def columns(options: argparse.Namespace, prompts: Sequence[Sequence[int]], temperature: float) -> dict[str, rows.Value]:
    """The columns NAMES and the number of places, on texts that the target samples behind the prompts (token ids)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(options.seed)
    load: Any = AutoModelForCausalLM.from_pretrained
    target, draft = (load(folder, dtype=torch.float32).eval() for folder in (options.target, options.draft))
    sums, places = dict.fromkeys(NAMES, 0.0), 0
    with torch.inference_mode():
        for index, prompt in enumerate(prompts):
            text = target.generate(
                torch.tensor([list(prompt)]),
                max_new_tokens=options.max_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )
            logits = [model(text).logits[0, len(prompt) - 1 : -1].numpy() for model in (target, draft)]
            width = min(found.shape[1] for found in logits)  # one model's vocabulary may be padded
            seeds = [options.seed + index * options.repeats + repeat for repeat in range(options.repeats)]
            target_logits, draft_logits = (found[:, :width] for found in logits)
            for name, value in agreement(target_logits, draft_logits, temperature, len(prompt) - 1, seeds).items():
                sums[name] += value
            places += len(logits[0])
    return {"places": places} | {name: value / places for name, value in sums.items()}


def server_columns(grown: Mapping[str, float]) -> dict[str, rows.Value]:
    """What a double server counted; None where it has no such counter."""

    def share_of(numerator: str, denominator: str) -> float | None:
        right, trials = grown.get(f"vllm:double_{numerator}_total"), grown.get(f"vllm:double_{denominator}_total")
        return None if right is None or not trials else right / trials

    spent = speculation(grown)
    return {
        "server_first": share_of("draft_first_accepted", "draft_first_examples"),
        "server_covered_3": share_of("draft_listed_accepted", "draft_first_examples"),
        "server_examples": grown.get("vllm:double_draft_first_examples_total"),
        "server_acceptance": spent.acceptance,
        "server_hit_rate": spent.hit_rate,
        "server_chain_length": spent.chain_length,
        "server_tokens_per_forward": spent.tokens_per_forward,
    }


def serve(options: argparse.Namespace, arm: Arm, requests: Sequence[Request]) -> dict[float, dict[str, rows.Value]]:
    """``server_columns`` by temperature; each request has a seed of its own."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="vllm-double-coupling-") as folder:
        target = workload.inflated(options.target, options.layers, Path(folder))
        base = ServerConfig(target, tuple(options.cores), dtype=options.dtype, max_model_len=options.max_model_len)
        with Fleet([arm], base, options.logs) as fleet:
            for temperature in options.temperature:
                asked = [replace(request, temperature=temperature) for request in requests]
                before = counters(fleet.server(arm).metrics())
                fleet.ask(arm, asked, options.batch)
                found[temperature] = server_columns(growth(before, counters(fleet.server(arm).metrics())))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Appends a row for each temperature."""
    exit_on_sigterm()
    options = arguments(argv)
    every = tuple(options.cores)
    (arm,) = variants("double", Choices(options.draft, every, double_k=(options.k,)))
    prompts = workload.load_prompts(options.prompts, options.num_prompts)
    tokenizer = Tokenizer.from_file(str(options.target / "tokenizer.json"))
    requests = as_tokens(workload.requests(prompts, options.max_tokens, 1.0, seed=options.seed), tokenizer)
    texts = [request.prompt for request in requests]
    served = {} if options.no_server else serve(options, arm, requests)
    for temperature in options.temperature:
        row: dict[str, rows.Value] = {
            "target": options.target.name,
            "draft": options.draft.name,
            "temperature": temperature,
            "prompts": len(texts),
            "max_tokens": options.max_tokens,
            "repeats": options.repeats,
            "seed": options.seed,
        }
        row |= columns(options, texts, temperature)  # type: ignore[arg-type]
        row["server_layers"] = None if options.no_server else options.layers
        row["server_batch"] = None if options.no_server else options.batch
        row |= served.get(temperature) or dict.fromkeys(server_columns({}))
        rows.append(options.output, row | rows.provenance("benchmarks.coupling"))
        print("  ".join(f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float)), flush=True)


if __name__ == "__main__":
    main()
