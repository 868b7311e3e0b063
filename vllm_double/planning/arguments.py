"""The options of ``vllm-double plan``. Imports nothing, because every other command reads them, too."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a deployment is, in numbers that it measures."""
    parser.epilog = (
        "The defaults are what the bundled pair shows on a CPU. Of a server that runs, --token-cost is "
        "vllm:double_step_token_seconds / vllm:double_step_seconds on its page of metrics."
    )
    ratio, share, time = _number(0.01, 1000), _number(0, 1), _number(0)
    for name, kind, default, meaning in (
        ("--cost-ratio", _each(ratio), None, "C: target step at batch 1 / draft forward beside it; several with commas"),
        ("--acceptance", share, None, "how often the draft's first token is the target's at temperature 0"),
        ("--temperature", _number(0, 10), "0", "of the sampling; --acceptance and --tail say what is true at 0"),
        ("--batch", _each(_whole(1, 256)), "1", "requests that decode together; several with commas"),
        ("--retrieval-hit-rate", share, "0", "share of the output that repeats what retrieval has seen"),
        ("--tail", _number(0.01), "0.5", "where the draft's first token is wrong, (r + 1)^-TAIL of the next r are, too"),
        ("--token-cost", time, "0.03", "what each further token adds to a target step, as a share of it"),
        ("--draft-token-cost", time, "0.05", "what each further token adds to a draft forward, as a share of it"),
        ("--gap", time, "1", "what a step with a proposer takes on top, between two target forwards, in draft forwards"),
        ("--num-speculative-tokens", _whole(1, 127), "16", "most tokens that double verifies"),
        ("--tokens", _whole(32, 1_000_000), "400", "tokens that are simulated for each request"),
    ):
        is_required = default is None
        text = meaning if is_required else f"{meaning} (default: {default})"
        parser.add_argument(name, type=kind, default=default, required=is_required, metavar="X", help=text)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speed-ups over C; the suffix names the format")


def _number(low: float, high: float = math.inf) -> Callable[[str], float]:
    bounds = f"from {low:g} to {high:g}" if high < math.inf else f"a number from {low:g} on"

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (low <= number <= high and math.isfinite(number)):
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return number

    return read


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = _number(low, high)(text)
        if number != int(number):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number")
        return int(number)

    return read


def _each(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    return lambda text: [kind(part) for part in text.split(",")]
