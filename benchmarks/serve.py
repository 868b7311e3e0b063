"""The double server on the bundled pair, in the foreground: `make serve`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks import workload
from benchmarks.arms import Choices, variants
from benchmarks.machine import cores
from benchmarks.server import ServerConfig

__all__ = ["curl", "main"]


def curl(port: int) -> str:
    """A command line that asks the server for a completion."""
    body = {"model": "target", "prompt": "def main(", "max_tokens": 64, "temperature": 0}
    return (
        f"curl -s http://127.0.0.1:{port}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the curl line and becomes the server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--target", type=Path, default=workload.TARGET)
    parser.add_argument("--draft", type=Path, default=workload.DRAFT)
    parser.add_argument("--k", type=int, default=16, help="num_speculative_tokens")
    parser.add_argument("--dtype", default="float32")
    options, extra = parser.parse_known_args(argv)
    (arm,) = variants("double", Choices(options.draft, tuple(cores()), double_k=(options.k,)))
    config = ServerConfig(options.target, tuple(cores()), arm.speculative, dtype=options.dtype, extra=tuple(extra))
    command = config.command(options.port)
    print(f"{shlex.join(command)}\n\nWhen it is up:\n\n{curl(options.port)}\n", flush=True)
    os.execve(command[0], command, os.environ | config.variables())


if __name__ == "__main__":
    main()
