"""Greedy text of double against plain vLLM, token by token, up to the model's length limit.

    python -m benchmarks.parity --num-prompts 128 --max-tokens 256 --batch 1 8
    python -m benchmarks.parity --sampled

Prefix caching is on. In float32 every token has to be the same: the exit status is 1 otherwise.
``--divergences FILE`` keeps, as JSON lines, what an analysis of other dtypes needs: the prompt, the common
text, and the two tokens at the first difference. ``--sampled`` compares sampled texts with and without drafts instead
(benchmarks.sampled_parity).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import rows, workload
from benchmarks.arms import ARMS, Arm, Choices, variants
from benchmarks.client import Completion, Request, Round
from benchmarks.harness import Fleet
from benchmarks.machine import cores, parse_cores
from benchmarks.metrics import counters, growth, speculation
from benchmarks.run import portable
from benchmarks.sampled_cells import CONDITIONS
from benchmarks.server import ServerConfig, exit_on_sigterm
from benchmarks.stats import first_difference, is_looping, share

__all__ = ["arguments", "divergences", "main", "parity_row", "workload_of"]


def workload_of(
    prompts: Sequence[workload.Prompt], target: Path, max_model_len: int, max_tokens: int, num_limit: int
) -> list[Request]:
    """One request per prompt; ``num_limit`` of them, spread evenly, end exactly at ``max_model_len``."""
    found = workload.requests(prompts, max_tokens, 0.0)
    chosen = [index * len(prompts) // num_limit for index in range(num_limit)]
    limit = workload.to_the_limit([prompts[i] for i in chosen], target, max_model_len, max_tokens)
    for index, request in zip(chosen, limit, strict=True):
        found[index] = request
    return found


def divergences(
    requests: Sequence[Request], plain: Sequence[Completion], ours: Sequence[Completion]
) -> list[dict[str, object]]:
    """The first difference of every pair of texts that differ."""
    found: list[dict[str, object]] = []
    for request, a, b in zip(requests, plain, ours, strict=True):
        at = first_difference(a.tokens, b.tokens)
        if at is None and a.text == b.text and a.finish_reason == b.finish_reason:
            continue
        position = len(a.tokens) if at is None else at
        found.append(
            {
                "id": request.id,
                "prompt": request.prompt,
                "position": position,
                "common": a.tokens[:position],
                "plain": a.tokens[position : position + 1],
                "double": b.tokens[position : position + 1],
                "finish_reasons": [a.finish_reason, b.finish_reason],
            }
        )
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", default="double", choices=[name for name in ARMS if name != "plain"])
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--num-limit", type=int, default=16, help="of them, texts that end at max_model_len")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--layers", type=int, default=None, help="decoder layers of an inflated target")
    parser.add_argument("--k", type=int, default=16, help="num_speculative_tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--target", type=Path, default=workload.TARGET)
    parser.add_argument("--draft", type=Path, default=workload.DRAFT)
    parser.add_argument("--prompts", type=Path, default=workload.PROMPTS)
    parser.add_argument("--cores", type=parse_cores, default=cores())
    sampled = parser.add_argument_group("sampled texts")
    sampled.add_argument("--sampled", action="store_true", help="with drafts against without, on one server, with seeds")
    sampled.add_argument("--temperature", nargs="+", type=float, default=[0.3, 0.7, 1.0, 1.5])
    sampled.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    sampled.add_argument("--per-cell", type=int, default=8, help="prompts of each temperature and condition, at each batch")
    sampled.add_argument("--num-several", type=int, default=4, help="prompts that are asked for n = 4 texts")
    sampled.add_argument("--seed", type=int, default=1 << 40, help="of the first prompt; the next has the next")
    parser.add_argument("--divergences", type=Path, help="JSON lines with every first difference")
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "parity.csv")
    options = parser.parse_args(argv)
    num_cells = len(options.temperature) * len(options.conditions)
    if options.sampled and not -(-options.num_prompts // num_cells) <= options.per_cell <= options.num_prompts:
        parser.error(f"--per-cell: {num_cells} cells of so many prompts do not use each of {options.num_prompts}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all batch sizes; 1 if a float32 text differs, or a sampled one where rounding does not explain it."""
    exit_on_sigterm()
    options = arguments(argv)
    if options.sampled:
        from benchmarks.sampled_parity import sampled_parity  # it uses this module

        return sampled_parity(options)
    every = tuple(options.cores)
    choices = Choices(options.draft, every, (options.k,), (options.k,), (options.k,))
    plain, ours = variants("plain", choices)[-1], variants(options.arm, choices)[-1]
    prompts = workload.load_prompts(options.prompts, options.num_prompts)
    failed = False
    with tempfile.TemporaryDirectory(prefix="vllm-double-parity-") as folder:
        layers = options.layers or workload.count_layers(options.target)
        target = workload.inflated(options.target, layers, Path(folder))
        requests = workload_of(prompts, target, options.max_model_len, options.max_tokens, options.num_limit)
        base = ServerConfig(target, every, dtype=options.dtype, max_model_len=options.max_model_len)
        with Fleet([plain, ours], base, Path(folder)) as fleet:
            for batch in options.batch:
                expected = fleet.ask(plain, requests, batch)
                before = counters(fleet.server(ours).metrics())
                found = fleet.ask(ours, requests, batch)
                spent = speculation(growth(before, counters(fleet.server(ours).metrics())))
                different = divergences(requests, expected.completions, found.completions)
                failed |= bool(different) and options.dtype == "float32"
                row = parity_row(options, ours, layers, batch, expected, found, different)
                row |= {"tokens_per_forward": spent.tokens_per_forward, "acceptance": spent.acceptance}
                rows.append(options.output, row | rows.provenance("benchmarks.parity"))
                print(f"batch {batch}: {len(requests) - len(different)} of {len(requests)} texts identical, "
                      f"{found.tokens} tokens", flush=True)  # fmt: skip
                if options.divergences is not None:
                    with options.divergences.open("a") as file:
                        file.writelines(json.dumps({"batch": batch} | one) + "\n" for one in different)
    return int(failed)


def parity_row(
    options: argparse.Namespace, arm: Arm, layers: int, batch: int, plain: Round, ours: Round,
    different: Sequence[dict[str, object]],
) -> dict[str, rows.Value]:  # fmt: skip
    """The outcome at one batch size."""
    at_limit = [c for c in plain.completions if c.id.endswith("/limit") and len(c.tokens) == options.max_tokens]
    return {
        "arm": arm.name,
        "config": json.dumps(portable(arm.speculative)),
        "layers": layers,
        "dtype": options.dtype,
        "temperature": 0.0,
        "condition": None,
        "seed": None,
        "batch": batch,
        "prompts": len(plain.completions),
        "max_tokens": options.max_tokens,
        "max_model_len": options.max_model_len,
        "ended_at_limit": len(at_limit),
        "ended_by_eos": share([c.finish_reason == "stop" for c in plain.completions]),
        "looping": share([is_looping(c.tokens) for c in plain.completions]),
        "tokens": plain.tokens,
        "identical": len(plain.completions) - len(different),
        "first_differences": json.dumps([one["position"] for one in different]),
        "gaps": None,
        "largest_gap": None,
        "noise_p999": None,
        "explained": None,
    }


if __name__ == "__main__":
    sys.exit(main())
