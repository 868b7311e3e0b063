"""``vllm-double``: tools for operators, before a server runs and while it does. One module per command.

A command's module has ``HELP``, ``add_arguments(parser)`` and ``run(options)``, which returns the exit code. Importing it is
cheap.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vllm_double import __version__
from vllm_double.cli import check, datastore, plan, settings, switch

__all__ = ["main"]

_COMMANDS = {"check": check, "settings": settings, "datastore": datastore, "plan": plan, "switch": switch}


class _Parser(argparse.ArgumentParser):
    """Answers wrong arguments with a sentence, and without a page of usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vllm-double: {message}.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="vllm-double", description="Tools for vllm-double, a plug-in for vLLM.")
    parser.add_argument("--version", action="version", version=f"vllm-double {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, command in _COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    options = parser.parse_args(arguments)
    try:
        code: int = _COMMANDS[options.command].run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("vllm-double: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail at the exit
        return 141
    return code
