"""Trains the tokenizer, the target and the draft from the standard library's source.

    python benchmarks/pair/train.py --output benchmarks/pair

The work folder holds checkpoints; the same command goes on where an earlier run stopped.
"""

from __future__ import annotations

import os
import sys

if os.environ.get("MALLOC_MMAP_MAX_") is None and __name__ == "__main__":
    # glibc returns every large buffer to the system otherwise, and faults it in again at each step.
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="100000000000", MALLOC_TOP_PAD_="268435456")
    os.execv(sys.executable, [sys.executable, *sys.argv])

import argparse
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from copyhead import install
from data import CURRICULUM, EOS_ID, Corpus, fingerprint, modules, phase_at, train_tokenizer
from evaluate import evaluate, write_prompts
from model import DRAFT, TARGET, Llama, Shape, describe, export
from tokenizers import Tokenizer
from torch import Tensor


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz iterations towards the nearest orthogonal matrices; x: [n, a, b]."""
    flip = x.shape[1] > x.shape[2]
    x = x.mT if flip else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if flip else x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for weight matrices, in float32; same-shaped matrices go together."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, pool: ThreadPoolExecutor) -> None:
        super().__init__(params, {"lr": lr, "decay": 0.05, "momentum": 0.95})
        self.pool = pool

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(tuple(parameter.shape), []).append(parameter)
            list(self.pool.map(lambda parameters, group=group: self.update(group, parameters), shapes.values()))

    @torch.no_grad()
    def update(self, group: dict[str, float], parameters: list[torch.nn.Parameter]) -> None:
        """One step of matrices of one shape."""
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
            velocity.lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(velocity, group["momentum"]))
        scale = group["lr"] * 0.2 * math.sqrt(max(parameters[0].shape))
        for parameter, change in zip(parameters, orthogonal(torch.stack(updates)), strict=True):
            parameter.mul_(1 - group["lr"] * group["decay"]).sub_(change, alpha=scale)


def optimizers(model: Llama, lr: float, pool: ThreadPoolExecutor) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms (half the rate)."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [Muon(matrices, lr, pool), torch.optim.AdamW(rest, lr / 2, betas=(0.9, 0.95), weight_decay=0.01)]


def rate(share: float, warm: float = 0.015) -> float:
    """Factor of the peak learning rate: linear warm-up, then a straight line down to 3 %."""
    if share < warm:
        return (share + 1e-3) / warm
    return 1 - 0.97 * (share - warm) / (1 - warm)


def gradients(
    model: Llama, teacher: Llama | None, inputs: Tensor, labels: Tensor, scored: int
) -> tuple[tuple[Tensor, ...], float, int]:
    """Gradients of one part of a batch (inputs, labels: [rows, length]), for all parameters.

    The loss is a sum over the scored tokens divided by ``scored``, their number in the whole batch:
    cross-entropy with the labels or, with a teacher, the KL divergence from its distribution, in nats.
    Returns the gradients, this part of the loss and the number of tokens whose first choice is the label.
    """
    logits = model(inputs).flatten(0, 1)
    flat = labels.flatten()
    if teacher is None:
        loss = F.cross_entropy(logits, flat, reduction="sum") / scored
    else:
        with torch.no_grad():
            wanted = teacher(inputs).flatten(0, 1).log_softmax(-1)
        loss = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="sum") / scored
    right = int((logits.argmax(-1) == flat).sum())
    return torch.autograd.grad(loss, list(model.parameters())), float(loss.detach()), right


@torch.no_grad()
def held_loss(model: Llama, stream: np.ndarray, length: int = 512, rows: int = 480) -> float:
    """Mean cross-entropy in nats per token over ``rows`` windows of ``length`` tokens of held-out code."""
    windows = torch.from_numpy(stream[: (len(stream) - 1) // length * length + 1])
    total, count = 0.0, 0
    starts = np.linspace(0, len(windows) - length - 1, min(rows, (len(windows) - 1) // length)).astype(int)
    for at in range(0, len(starts), 16):
        part = torch.stack([windows[s : s + length + 1] for s in starts[at : at + 16]])
        logits = model(part[:, :-1])
        total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        count += part[:, 1:].numel()
    return total / count


@dataclass
class Run:
    """What the training of one model needs: token counts are totals, ``batch`` is tokens per step."""

    name: str
    shape: Shape
    tokens: int
    batch: int
    rate: float
    seed: int
    work: Path
    export_seconds: float
    threads: int
    part: int = 1024  # tokens in a part of a batch


def fit(run: Run, corpus: Corpus, held: np.ndarray, teacher: Llama | None = None) -> tuple[Llama, dict[str, float]]:
    """Trains a model, or goes on; with a teacher, code and edits are learned from its distribution."""
    torch.manual_seed(run.seed)
    model = Llama(run.shape)
    install(model)
    pool = ThreadPoolExecutor(run.threads, initializer=torch.set_num_threads, initargs=(1,))
    steppers = optimizers(model, run.rate, pool)
    peaks = [float(s.param_groups[0]["lr"]) for s in steppers]
    steps = run.tokens // run.batch
    first, spent = 0, 0.0
    checkpoint = run.work / f"{run.name}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for stepper, state in zip(steppers, saved["steppers"], strict=True):
            stepper.load_state_dict(state)
        first, spent = saved["step"], saved["seconds"]
        print(f"{run.name}: goes on at step {first}", flush=True)
    clock = last = time.monotonic()
    for step in range(first, steps):
        share = step / steps
        phase = phase_at(share)
        inputs, labels = map(torch.from_numpy, corpus.batch(run.seed, step, phase, run.batch))
        for stepper, peak in zip(steppers, peaks, strict=True):
            stepper.param_groups[0]["lr"] = peak * rate(share)
        # Parts go to threads as these become free, so that a busy core slows one thread and not both.
        cuts = range(0, len(inputs), max(1, run.part // phase.length))
        scored = int((labels != -100).sum())
        guide = None if phase.kind == "spans" else teacher
        pieces = [slice(c, c + cuts.step) for c in cuts]
        parts = [pool.submit(gradients, model, guide, inputs[p], labels[p], scored) for p in pieces]
        done = [part.result() for part in parts]
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.stack([d[0][index] for d in done]).sum(0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        now = time.monotonic()
        if step % 10 == 0:
            loss, right = sum(d[1] for d in done), sum(d[2] for d in done) / scored
            pace = (step - first + 1) * run.batch / (now - clock)
            line = f"{run.name} {step}/{steps} {phase.kind}{phase.length} loss {loss:.3f} right {right:.3f}"
            print(f"{line} {pace:.0f} tokens/s {spent + now - clock:.0f} s", flush=True)
        if step % 200 == 199:
            print(f"{run.name} {step}: held-out loss {held_loss(model, held, rows=64):.3f}", flush=True)
        if now - last > run.export_seconds or step == steps - 1:
            last = now
            states = [s.state_dict() for s in steppers]
            seconds = spent + now - clock
            saved = {"model": model.state_dict(), "steppers": states, "step": step + 1, "seconds": seconds}
            torch.save(saved, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            export(model, corpus.tokenizer, run.work / "latest" / run.name)
    seconds = spent + time.monotonic() - clock
    return model, {"tokens": steps * run.batch, "steps": steps, "seconds": round(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--work", type=Path, default=Path("/tmp/pair/work"), help="checkpoints")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--target-tokens", type=int, default=9_000_000)
    parser.add_argument("--draft-tokens", type=int, default=1_800_000)
    parser.add_argument("--batch", type=int, default=3072, help="tokens in a step, a multiple of 1024")
    parser.add_argument("--target-rate", type=float, default=5e-3)
    parser.add_argument("--draft-rate", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--export-seconds", type=float, default=180.0, help="between checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the threads take parts of a batch instead
    args.work.mkdir(parents=True, exist_ok=True)

    train, held = modules()
    at = args.work / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(at)) if at.exists() else train_tokenizer(train)
    tokenizer.save(str(at))
    corpus = Corpus(tokenizer, train)
    encoded = tokenizer.encode_batch(list(held.values()))
    stream = np.concatenate([np.array([*e.ids, EOS_ID], dtype=np.int64) for e in encoded])
    print(f"{len(train)} modules, {len(corpus.stream)} tokens; held out {len(held)}, {len(stream)}", flush=True)

    common: dict[str, Any] = {"batch": args.batch, "seed": args.seed, "work": args.work}
    common |= {"export_seconds": args.export_seconds, "threads": args.threads}
    target_run = Run("target", TARGET, args.target_tokens, rate=args.target_rate, **common)
    target, target_facts = fit(target_run, corpus, stream)
    target = target.bfloat16().float().eval()  # the teacher is the target as stored
    export(target, tokenizer, args.output / "target")
    draft_run = Run("draft", DRAFT, args.draft_tokens, rate=args.draft_rate, **common)
    draft, draft_facts = fit(draft_run, corpus, stream, teacher=target)
    draft = draft.bfloat16().float().eval()
    export(draft, tokenizer, args.output / "draft")

    facts = {
        "python": sys.version.split()[0],
        "train_modules": len(train),
        "train_tokens": len(corpus.stream),
        "train_sha256": fingerprint(train),
        "held_out_modules": list(held),
        "held_out_tokens": len(stream),
        "curriculum": [str(phase) for phase in CURRICULUM],
        "seed": args.seed,
        "batch_tokens": args.batch,
        "target": {**describe(TARGET), **target_facts, "held_out_loss": round(held_loss(target, stream), 4)},
        "draft": {**describe(DRAFT), **draft_facts, "held_out_loss": round(held_loss(draft, stream), 4)},
    }
    (args.output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2), flush=True)
    torch.set_num_threads(args.threads)
    write_prompts(args.output)
    report = evaluate(args.output, new=256)
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
