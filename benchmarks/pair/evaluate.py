"""Held-out prompts and the report on a trained pair.

    python benchmarks/pair/evaluate.py --pair benchmarks/pair

Reads ``target``, ``draft`` and ``prompts.jsonl`` from the pair's folder and writes ``report.json`` there.
``--write-prompts`` makes ``prompts.jsonl`` anew from the running interpreter's standard library first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import EOS_ID, HELD_OUT, IDENTIFIER, make_edit, modules
from tokenizers import Tokenizer

COMPLETIONS, EDITS = 176, 40
PROMPT_TOKENS = (60, 200)
EDIT_TOKENS = (60, 240)  # of the edited copy
LOOP_TAIL, LOOP_PERIOD = 64, 16


def completion_prompt(rng: np.random.Generator, tokenizer: Tokenizer, lines: list[str]) -> str | None:
    """Whole lines of 60 to 200 tokens; half of them end with the header of a function or a class."""
    headers = [i for i, line in enumerate(lines) if line.lstrip().startswith(("def ", "class ")) and line.endswith(":")]
    bodies = [i for i, line in enumerate(lines) if line.startswith("    ") and line.strip()]
    ends = headers if rng.random() < 0.5 else bodies
    if not ends:
        return None
    end = ends[int(rng.integers(len(ends)))]
    wanted = int(rng.integers(*PROMPT_TOKENS))
    prompt = ""
    for start in range(end, -1, -1):
        longer = "\n".join(lines[start : end + 1])
        if len(tokenizer.encode(longer).ids) > wanted:
            break
        prompt = longer
    prompt = prompt.lstrip("\n")
    return prompt if PROMPT_TOKENS[0] <= len(tokenizer.encode(prompt).ids) else None


def make_prompts(tokenizer: Tokenizer, seed: int = 11) -> list[dict[str, str]]:
    """Completions {id, kind, module, prompt}; edits have ``edited``, the rest of the wanted copy, besides."""
    _, held = modules()
    rng = np.random.default_rng(seed)
    made: list[dict[str, str]] = []
    seen: set[str] = set()
    for kind, count in (("completion", COMPLETIONS), ("edit", EDITS)):
        while sum(p["kind"] == kind for p in made) < count:
            module = HELD_OUT[len(made) % len(HELD_OUT)]
            lines = held[module].splitlines()
            entry = {"id": f"{kind}-{len(made):03d}", "kind": kind, "module": module}
            if kind == "completion":
                text = completion_prompt(rng, tokenizer, lines)
                if text is None or text in seen:
                    continue
                seen.add(text)
                made.append({**entry, "prompt": text})
                continue
            names = sorted(set(IDENTIFIER.findall(held[module])))
            edit = make_edit(rng, lines, names, int(rng.integers(250, 750)))
            if edit is None:
                continue
            first, _, rest = edit.edited.partition("\n")
            size = len(tokenizer.encode(edit.edited).ids)
            if first.strip() and EDIT_TOKENS[0] <= size <= EDIT_TOKENS[1]:
                made.append({**entry, "prompt": edit.shown + first, "edited": "\n" + rest})
    return made


def loops(tokens: list[int]) -> bool:
    """Whether the last 64 tokens repeat with a period of 16 tokens or fewer."""
    tail = tokens[-LOOP_TAIL:]
    return len(tail) == LOOP_TAIL and any(tail[p:] == tail[:-p] for p in range(1, LOOP_PERIOD + 1))


def load(folder: Path) -> Any:
    """The stored bfloat16 weights, computed with in float32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Tokenizer, windows: int = 160, length: int = 512) -> float:
    """Mean nats per token over ``windows`` windows of ``length`` tokens of the held-out modules."""
    _, held = modules()
    stream = np.concatenate([np.array([*e.ids, EOS_ID]) for e in tokenizer.encode_batch(list(held.values()))])
    starts = np.linspace(0, len(stream) - length - 1, windows).astype(int)
    total = 0.0
    for at in range(0, windows, 16):
        part = torch.from_numpy(np.stack([stream[s : s + length + 1] for s in starts[at : at + 16]]))
        logits = model(part[:, :-1]).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / (windows * length)


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]], new: int, rows: int = 54) -> list[list[int]]:
    """Greedy continuations, at most ``new`` tokens each, up to and without EOS."""
    texts: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), rows):
        part = order[at : at + rows]
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[EOS_ID] * (width - len(prompts[i])) + prompts[i] for i in part])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=EOS_ID)
        print(f"{at + len(part)} of {len(order)} prompts", file=sys.stderr, flush=True)
        for i, row in zip(part, out[:, width:].tolist(), strict=True):
            texts[i] = row[: row.index(EOS_ID)] if EOS_ID in row else row
    return texts


@torch.no_grad()
def hits(model: Any, prompt: list[int], text: list[int]) -> list[bool]:
    """For each token of ``text``: whether it is the model's first choice after the true prefix."""
    if not text:
        return []
    logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    return [bool(h) for h in logits.argmax(-1) == torch.tensor(text)]


def mean(values: list[bool] | list[float]) -> float:
    return round(float(np.mean(values)), 4) if values else float("nan")


def evaluate(pair: Path, new: int) -> dict[str, Any]:
    """All figures of the report; ``new`` is the greatest number of new tokens per prompt."""
    tokenizer = Tokenizer.from_file(str(pair / "target" / "tokenizer.json"))
    prompts = [json.loads(line) for line in (pair / "prompts.jsonl").read_text().splitlines()]
    target, draft = load(pair / "target"), load(pair / "draft")
    encoded = [tokenizer.encode(p["prompt"]).ids for p in prompts]
    texts = greedy(target, encoded, new)
    report: dict[str, Any] = {
        "python": sys.version.split()[0],
        "dtype": "bfloat16 weights, float32 arithmetic",
        "new_tokens": new,
        "target_held_out_loss": round(held_out_loss(target, tokenizer), 4),
        "draft_held_out_loss": round(held_out_loss(draft, tokenizer), 4),
    }
    for kind in ("completion", "edit"):
        chosen = [i for i, p in enumerate(prompts) if p["kind"] == kind]
        accepted = [hits(draft, encoded[i], texts[i]) for i in chosen]
        calm = [a for i, a in zip(chosen, accepted, strict=True) if not loops(texts[i])]
        report[kind] = {
            "prompts": len(chosen),
            "tokens": sum(len(texts[i]) for i in chosen),
            "ended_with_eos": mean([len(texts[i]) < new for i in chosen]),
            "looping": mean([loops(texts[i]) for i in chosen]),
            "draft_acceptance": mean([h for a in accepted for h in a]),
            "draft_acceptance_first_64_tokens": mean([h for a in accepted for h in a[:64]]),
            "draft_acceptance_without_loops": mean([h for a in calm for h in a]),
        }
    exact, lead, right, draft_right = [], [], [], []
    for i, p in enumerate(prompts):
        if p["kind"] != "edit":
            continue
        # Tokens of the whole edited text, so that the split at the prompt's end is the tokenizer's own.
        wanted = tokenizer.encode(p["prompt"] + p["edited"]).ids[len(encoded[i]) :]
        same = [a == b for a, b in zip(texts[i], wanted, strict=False)]
        lead.append((same.index(False) if False in same else len(same)) / len(wanted))
        exact.append(texts[i] == wanted)
        right += hits(target, encoded[i], wanted)
        draft_right += hits(draft, encoded[i], wanted)
    report["copying"] = {
        "next_token_right": mean(right),
        "draft_next_token_right": mean(draft_right),
        "whole_edit_exact": mean(exact),
        "share_before_first_difference": mean(lead),
    }
    shown = [i for i, p in enumerate(prompts) if p["kind"] == "completion"][:: COMPLETIONS // 6][:6]
    report["samples"] = [{"id": prompts[i]["id"], "text": tokenizer.decode(texts[i])} for i in shown]
    files = [p for name in ("target", "draft") for p in (pair / name).iterdir()]
    report["megabytes"] = round(sum(p.stat().st_size for p in files) / 1e6, 2)
    return report


def write_prompts(pair: Path) -> None:
    tokenizer = Tokenizer.from_file(str(pair / "target" / "tokenizer.json"))
    lines = [json.dumps(p) + "\n" for p in make_prompts(tokenizer)]
    (pair / "prompts.jsonl").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=Path(__file__).parent)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--write-prompts", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.write_prompts:
        write_prompts(args.pair)
    report = evaluate(args.pair, args.new_tokens)
    (args.pair / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "samples"}, indent=2))


if __name__ == "__main__":
    main()
