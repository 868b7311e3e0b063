"""``vllm-double check``."""

import argparse
import sys
import zipfile
from pathlib import Path

__all__ = ["HELP", "add_arguments", "run"]

HELP = "check whether method double works with a version of vLLM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, help="wheel of vLLM, or folder that holds vllm/ (default: the installed one)")


def run(options: argparse.Namespace) -> int:
    from vllm_double.integration.hooks import ENTRIES, UnsupportedVllm, check, require

    source, root = options.source, None
    if source is not None:
        try:
            root = zipfile.Path(source) if source.is_file() else source
        except zipfile.BadZipFile:
            root = source
        if not (root / "vllm/__init__.py").is_file():
            print(f"vllm-double: {source} is neither a wheel of vLLM nor a folder that holds it.", file=sys.stderr)
            return 2
    mismatches = check(ENTRIES, root)
    for mismatch in mismatches:
        print(f"vllm-double: {mismatch}", file=sys.stderr)
    if not mismatches and source is None:
        try:
            require(ENTRIES)
        except UnsupportedVllm as error:  # a version that is too old
            print(f"vllm-double: {error}", file=sys.stderr)
            return 1
    if not mismatches:
        print(f"This vLLM fits: all {len(ENTRIES)} hooks of vllm-double are as expected.")
    return int(bool(mismatches))
