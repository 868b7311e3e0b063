"""Goes on training the draft on what the target itself writes, as DistillSpec does (arXiv 2310.08461).

    python benchmarks/pair/distill.py --pair benchmarks/pair

After train.py the draft has only seen source code, and not the target's own text, which is what it has to foresee.
Here the target continues prompts from modules that its training did not focus on, half of them greedily and half by
sampling at temperature 1, and the draft learns the target's distribution at every token (KL divergence). Overwrites
``draft`` and adds ``distillation`` to ``training.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from data import EOS_ID, Corpus, modules
from evaluate import load
from model import DRAFT, TARGET, Llama, Shape, export
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from train import gradients, optimizers, rate

LENGTH = 256  # tokens of a training sequence: a prompt and what the target writes behind it
PROMPT = 64
EDITS = 1 / 6  # of the texts, from an edit's first lines on


def stored(folder: Path, shape: Shape) -> Llama:
    """The exported model, computed with in float32."""
    model = Llama(shape)
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return model


def beginnings(corpus: Corpus, rng: np.random.Generator, count: int) -> np.ndarray:
    """int64 [count, PROMPT]: code from modules that training did not focus on, and edits."""
    rows = []
    for _ in range(count):
        if rng.random() < EDITS:
            rows.append(corpus.edit_row(rng, PROMPT, (80, 300), focus=False))
        else:
            at = int(rng.integers(corpus.focus_length, len(corpus.stream) - PROMPT))
            rows.append(corpus.stream[at : at + PROMPT])
    return np.stack(rows)


@torch.no_grad()
def written(folder: Path, prompts: np.ndarray, sample: bool, rows: int = 128) -> Tensor:
    """int64 [prompts, LENGTH]: the prompts and the target's continuations, without an end before LENGTH."""
    target = load(folder)
    parts = []
    for at in range(0, len(prompts), rows):
        part = torch.from_numpy(prompts[at : at + rows])
        kept = {"max_new_tokens": LENGTH + 1 - PROMPT, "min_new_tokens": LENGTH + 1 - PROMPT, "pad_token_id": EOS_ID}
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
        parts.append(target.generate(part, attention_mask=torch.ones_like(part), **kept, **how))
        print(f"{'sampled' if sample else 'greedy'}: {at + len(part)} of {len(prompts)}", flush=True)
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=Path(__file__).parent)
    parser.add_argument("--texts", type=int, default=6000)
    parser.add_argument("--passes", type=float, default=1.5, help="how often each text is seen")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--batch", type=int, default=3072, help="tokens in a step")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, help="folder that keeps the target's texts for another run")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the threads take parts of a batch instead
    corpus = Corpus(tokenizer := Tokenizer.from_file(str(args.pair / "target" / "tokenizer.json")), modules()[0])
    rng = np.random.default_rng(args.seed)
    began = time.monotonic()
    kept = args.work / "written.pt" if args.work else None
    if kept and kept.exists():
        texts = torch.load(kept)
    else:
        prompts = beginnings(corpus, rng, args.texts)
        greedy = args.texts // 2
        folder = args.pair / "target"
        texts = torch.cat([written(folder, prompts[:greedy], False), written(folder, prompts[greedy:], True)])
        if kept:
            torch.save(texts, kept)
    print(f"{texts.numel()} tokens in {time.monotonic() - began:.0f} s", flush=True)

    teacher, draft = stored(args.pair / "target", TARGET).eval(), stored(args.pair / "draft", DRAFT)
    pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    steppers = optimizers(draft, args.rate, pool)
    peaks = [float(s.param_groups[0]["lr"]) for s in steppers]
    rows = args.batch // LENGTH
    steps = int(len(texts) * args.passes) // rows
    order = np.concatenate([rng.permutation(len(texts)) for _ in range(int(args.passes) + 1)])
    for step in range(steps):
        for stepper, peak in zip(steppers, peaks, strict=True):
            stepper.param_groups[0]["lr"] = peak * rate(step / steps, warm=0.05)
        batch = texts[order[step * rows : (step + 1) * rows]]
        cuts = [slice(c, c + 4) for c in range(0, rows, 4)]
        parts = [pool.submit(gradients, draft, teacher, batch[c, :-1], batch[c, 1:], rows * LENGTH) for c in cuts]
        done = [part.result() for part in parts]
        for index, parameter in enumerate(draft.parameters()):
            parameter.grad = torch.stack([d[0][index] for d in done]).sum(0)
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        if step % 10 == 0:
            loss, right = sum(d[1] for d in done), sum(d[2] for d in done) / (rows * LENGTH)
            print(f"{step}/{steps} loss {loss:.3f} right {right:.3f} {time.monotonic() - began:.0f} s", flush=True)
    export(draft, tokenizer, args.pair / "draft")
    facts = json.loads((args.pair / "training.json").read_text())
    facts["distillation"] = {
        "texts": len(texts),
        "tokens": steps * args.batch,
        "steps": steps,
        "rate": args.rate,
        "seed": args.seed,
        "seconds": round(time.monotonic() - began),
    }
    (args.pair / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
