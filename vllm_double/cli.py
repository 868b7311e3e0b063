"""``vllm-double``: what an operator may want to know before the server runs."""

import argparse
import sys
from collections.abc import Sequence

from vllm_double import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="vllm-double", description="Tools around the vLLM plug-in vllm-double.")
    parser.add_argument("--version", action="version", version=f"vllm-double {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="whether the installed vLLM is one that method double works with")
    commands.add_parser("settings", help='the settings under "double" in --speculative-config')
    options = parser.parse_args(arguments)
    return _check() if options.command == "check" else _settings()


def _check() -> int:
    from vllm_double.patches import UnsupportedVllm, require

    try:
        require()
    except UnsupportedVllm as error:
        print(f"vllm-double: {error}", file=sys.stderr)
        return 1
    print("The installed vLLM fits: every function that vllm-double wraps or relies on is as expected.")
    return 0


def _settings() -> int:
    from vllm_double.config import DoubleConfig

    for name, entry in DoubleConfig.model_fields.items():
        print(f"{name} = {entry.default!r}\n    {entry.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
