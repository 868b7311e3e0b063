"""``vllm-double plan``."""

import argparse

from vllm_double.planning.arguments import add_arguments

__all__ = ["HELP", "add_arguments", "run"]

HELP = "predict the speed-up of double and of other methods"


def run(options: argparse.Namespace) -> int:
    from vllm_double.planning.command import plan

    return plan(options)
