"""``vllm-double settings``."""

import argparse

__all__ = ["HELP", "add_arguments", "run"]

HELP = 'list the settings under "double" in --speculative-config'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # there are none


def run(options: argparse.Namespace) -> int:
    from vllm_double.config import DoubleConfig

    for name, entry in DoubleConfig.model_fields.items():
        print(f"{name} = {entry.default!r}\n    {entry.description}")
    return 0
