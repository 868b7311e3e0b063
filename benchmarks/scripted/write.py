"""Writes a scripted target and its prompts: python -m benchmarks.scripted.write --output DIR --count 32

The folder has links to the weights of the target, its config with the architecture of benchmarks.scripted.model, the
script, and prompts.jsonl. Text: modules of the running Python's standard library that the pair is not trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks import workload
from benchmarks.pair.data import modules
from benchmarks.scripted import ARCHITECTURE
from benchmarks.scripted.edits import PIECE_TOKENS, Edit, make_edits

__all__ = ["KIND", "main", "write"]

KIND = "scripted-edit"


def write(target: Path, output: Path, count: int, seed: int = 0, piece_tokens: tuple[int, int] = PIECE_TOKENS) -> list[Edit]:
    """Writes ``output``, a new folder, from the (inflated or bundled) ``target``; returns the edits in its prompts' order."""
    _, held_out = modules()
    edits = make_edits(held_out, Tokenizer.from_file(str(target / "tokenizer.json")), count, seed, piece_tokens)
    output.mkdir(parents=True)
    for path in target.iterdir():
        if path.is_file() and path.name != "config.json":
            (output / path.name).symlink_to(path.resolve())
    config = json.loads((target / "config.json").read_text()) | {"architectures": [ARCHITECTURE]}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    script = [{"prompt": edit.prompt_tokens, "reply": edit.reply_tokens} for edit in edits]
    prompts = [
        {"id": f"{KIND}-{index:03}", "kind": KIND, "module": edit.module, "prompt": edit.prompt, "reply": edit.reply}
        for index, edit in enumerate(edits)
    ]
    for name, entries in (("script.jsonl", script), ("prompts.jsonl", prompts)):
        (output / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return edits


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the folder and says how much of the replies is in the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=Path, default=workload.TARGET)
    options = parser.parse_args(argv)
    edits = write(options.target, options.output, options.count, options.seed)
    print(f"{options.output}: {len(edits)} edits, {sum(len(edit.reply_tokens) for edit in edits)} tokens of replies")


if __name__ == "__main__":
    main()
