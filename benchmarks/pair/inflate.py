"""A costlier target that computes exactly the same function, from a small one.

    python benchmarks/pair/inflate.py --source benchmarks/pair/target --output DIR --layers 66 --check

``--layers N`` adds decoder layers whose output projections (``o_proj``, ``down_proj``) are zero, so that each
adds 0 to the hidden state: the logits stay the same bit for bit, in float32 and in bfloat16.  All other
weights of an added layer are random and not zero, so the work of the layer is done in full.  Added layers
stand evenly between the trained ones.

``--intermediate-size M`` widens every layer's feed-forward part: random rows for ``gate_proj`` and
``up_proj``, zero columns for ``down_proj``.  It makes the target heavier in memory, and adds exactly 0 in
real arithmetic; but a matrix product over more columns may sum in another order, so the logits may differ
in their last bits.  Where runs are compared token for token, use ``--layers`` only.

``--cost-ratio C`` chooses the number of layers: with ``--draft-step-ms X --layer-ms Y`` (measured on the
machine) C * X / Y layers; without them, a layer of the target is taken to cost what a layer of the draft does
(true on a CPU, where overhead rules), so C times the number of layers in ``--draft`` (default: the folder
``draft`` beside the source).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ZERO = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def widen(name: str, weight: Tensor, size: int, random: torch.Generator) -> Tensor:
    """Extends a feed-forward weight to ``size`` units; others come back as they are."""
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        more = torch.randn(size - weight.shape[0], weight.shape[1], generator=random) * 0.05
        return torch.cat([weight, more.to(weight.dtype)])
    if name.endswith("down_proj.weight"):
        return torch.cat([weight, weight.new_zeros(weight.shape[0], size - weight.shape[1])], dim=1)
    return weight


def filler(name: str, like: Tensor, random: torch.Generator) -> Tensor:
    """The weight of an added layer: zero where it writes to the hidden state, ones for norms, else random."""
    if name in ZERO:
        return torch.zeros_like(like)
    if like.ndim == 1:
        return torch.ones_like(like)
    return (torch.randn(like.shape, generator=random) * 0.05).to(like.dtype)


def inflate(source: Path, output: Path, layers: int, intermediate: int | None = None, seed: int = 0) -> None:
    """Writes to ``output`` a model of ``layers`` decoder layers with the function of the one in ``source``.

    The tokenizer and the generation settings are copied.
    """
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    old, size = int(config["num_hidden_layers"]), int(intermediate or config["intermediate_size"])
    if layers < old or size < int(config["intermediate_size"]):
        raise ValueError(f"a target can only grow: it has {old} layers, intermediate size {size}")
    random = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    trained: dict[str, dict[str, Tensor]] = {}
    with safe_open(source / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            weight = widen(name, file.get_tensor(name), size, random)
            if name.startswith("model.layers."):
                _, _, index, rest = name.split(".", 3)
                trained.setdefault(index, {})[rest] = weight
            else:
                weights[name] = weight
    places = {i * layers // old: str(i) for i in range(old)}
    for at in range(layers):
        for rest, like in trained["0"].items():
            kept = trained[places[at]][rest] if at in places else filler(rest, like, random)
            weights[f"model.layers.{at}.{rest}"] = kept.contiguous()
    output.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(path, output / path.name)
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)
    config.update(num_hidden_layers=layers, intermediate_size=size)
    config.pop("layer_types", None)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def check(source: Path, output: Path, rows: int = 4, length: int = 128) -> dict[str, dict[str, float | bool]]:
    """Compares the logits of the two models on random tokens, in float32 and in bfloat16.

    Returns, for each dtype, whether they are equal bit for bit and the largest difference.
    """
    from transformers import AutoModelForCausalLM

    found: dict[str, dict[str, float | bool]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        load: Any = AutoModelForCausalLM.from_pretrained
        one, other = (load(p, dtype=dtype).eval() for p in (source, output))
        tokens = torch.randint(1, one.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            first, second = one(tokens).logits, other(tokens).logits
        gap = float((first.float() - second.float()).abs().max())
        found[str(dtype)] = {"equal": bool(torch.equal(first, second)), "largest_difference": gap}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--layers", type=int)
    count.add_argument("--cost-ratio", type=float)
    parser.add_argument("--draft", type=Path, help="with --cost-ratio: the draft's folder")
    parser.add_argument("--draft-step-ms", type=float, help="with --cost-ratio: a draft step, milliseconds")
    parser.add_argument("--layer-ms", type=float, help="with --cost-ratio: a layer of the target, milliseconds")
    parser.add_argument("--intermediate-size", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="compare the logits with transformers")
    args = parser.parse_args()

    old = int(json.loads((args.source / "config.json").read_text())["num_hidden_layers"])
    layers = args.layers or old
    if args.cost_ratio is not None:
        if (args.draft_step_ms is None) != (args.layer_ms is None):
            parser.error("--draft-step-ms and --layer-ms go together")
        if args.draft_step_ms is not None:
            layers = round(args.cost_ratio * args.draft_step_ms / args.layer_ms)
        else:
            draft = (args.draft or args.source.parent / "draft") / "config.json"
            layers = round(args.cost_ratio * int(json.loads(draft.read_text())["num_hidden_layers"]))
        layers = max(old, layers)
    inflate(args.source, args.output, layers, args.intermediate_size, args.seed)
    size = (args.output / "model.safetensors").stat().st_size
    print(f"{args.output}: {layers} layers, {size / 1e6:.1f} MB")
    if args.check:
        found = check(args.source, args.output)
        print(json.dumps(found, indent=2))
        if args.intermediate_size is None and not all(f["equal"] for f in found.values()):
            raise SystemExit("the logits differ")


if __name__ == "__main__":
    main()
