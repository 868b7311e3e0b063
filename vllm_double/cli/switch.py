"""``vllm-double switch``."""

import argparse
import sys

__all__ = ["HELP", "add_arguments", "run"]

HELP = "turn drafting off and on in a running server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("off", "on", "status"))
    parser.add_argument("--pid", type=int, help="any process of the server; needed if you run several servers")
    parser.add_argument("--port", type=int, help="port on which the server listens; likewise")
    parser.add_argument("--reason", default="", help="written to the server's log")
    parser.add_argument("--calibration", action="store_true", help="also show how often draft tokens of each source are right")


def run(options: argparse.Namespace) -> int:
    from vllm_double.operations.switch import SwitchError, find_servers, select, switch

    servers, left_out = find_servers()
    for sentence in left_out:
        print(f"vllm-double: {sentence}", file=sys.stderr)
    try:
        servers = select(servers, options.pid, options.port)
        if options.action != "status":
            servers = [switch(servers, options.action == "on", options.reason)]
    except SwitchError as error:
        print(f"vllm-double: {error}", file=sys.stderr)
        return 1
    for server in servers:
        print(*server.lines(options.calibration), sep="\n")
    return 0
