"""The options of ``vllm-double plan``. Imports nothing of ours, because every command reads them."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A deployment, as numbers that can be measured."""
    parser.epilog = (
        "The defaults were measured with the bundled pair on a CPU. A running server shows --token-cost on /metrics: "
        "vllm:double_step_token_seconds / vllm:double_step_seconds."
    )
    ratio, share, time = _number(0.01, 1000), _number(0, 1), _number(0)
    for name, kind, default, meaning in (
        ("--cost-ratio", _each(ratio), None, "C: target step at batch 1 / draft forward, while both run; or several: 4,8"),
        ("--acceptance", share, None, "share of draft tokens that the target accepts at temperature 0"),
        ("--temperature", _number(0, 10), "0", "of the sampling; --acceptance and --tail are measured at temperature 0"),
        ("--batch", _each(_whole(1, 256)), "1", "requests that decode together; or several: 1,4"),
        ("--retrieval-hit-rate", share, "0", "share of the output that retrieval finds in earlier text"),
        ("--tail", _number(0.01), "0.5", "chance (r + 1)^-X that after a wrong first token the draft's next r are wrong, too"),
        ("--token-cost", time, "0.03", "each further token adds this share of a target step"),
        ("--draft-token-cost", time, "0.05", "each further token adds this share of a draft forward"),
        ("--gap", time, "1", "time between two target forwards that a proposer adds, in draft forwards"),
        ("--num-speculative-tokens", _whole(1, 127), "16", "draft tokens that double verifies at most"),
        ("--tokens", _whole(32, 1_000_000), "400", "simulated tokens of each request"),
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
