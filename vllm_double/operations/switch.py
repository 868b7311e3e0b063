"""Finds running servers on this host, and turns their drafting off and on."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_double.hosting.process_care import parent
from vllm_double.operations.control_socket import Address, Answer, ask, find
from vllm_double.target.calibration import TEMPERATURE_NAMES

__all__ = ["Server", "SwitchError", "find_servers", "select", "switch"]

_TIMEOUT_S = 5.0
_LISTENS = "0A"  # a socket's state in /proc/net/tcp


class SwitchError(RuntimeError):
    """The command cannot be carried out; the message is one sentence for the person who typed it."""


@dataclass(slots=True)
class Server:
    """pid: of `vllm serve`, say. ports: TCP ports that it listens on, if they can be seen. engines: the answer of each."""

    key: str
    pid: int
    ports: list[int]
    engines: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        ports = "".join(f", port {port}" for port in self.ports)
        return f"pid {self.pid}{ports}"

    def lines(self, with_calibration: bool) -> list[str]:
        """The state of each engine; with_calibration: and how often draft tokens of each source were accepted."""
        lines = []
        for engine, values in self.engines.items():
            lines.append(f"{self}{f', engine {engine}' if len(self.engines) > 1 else ''}: {_state(values)}")
            for source, temperatures, edge, chance, trials in values["calibration"] if with_calibration else ():
                kind = TEMPERATURE_NAMES[temperatures]
                lines.append(f"    {source}, {kind}: from {edge:.2f} on it was right {chance:.3f} of {trials:.0f} times")
        return lines


def find_servers() -> tuple[list[Server], list[str]]:
    """This user's servers with method double, and one sentence about each engine that is left out."""
    servers: dict[str, Server] = {}
    left_out: list[str] = []
    for address in find():
        try:
            answer = ask(address, timeout_s=_TIMEOUT_S)
        except (TimeoutError, PermissionError) as error:
            left_out.append(str(error))
        except (OSError, ValueError):
            continue  # it is about to end
        else:
            if answer.process == 0:
                left_out.append("An engine in another container is left out.")
                continue
            pid = _launcher(answer)
            server = servers.setdefault(address.key, Server(address.key, pid, _listening_ports(pid)))
            server.engines[address.engine] = answer.values
    return sorted(servers.values(), key=lambda server: server.pid), left_out


def select(servers: Sequence[Server], pid: int | None, port: int | None) -> list[Server]:
    """The servers with this process and this port; None: any. Raises SwitchError if there is none."""
    chosen = [server for server in servers if pid is None or _is_within(pid, server.pid)]
    chosen = [server for server in chosen if port is None or port in server.ports]
    if not chosen:
        asked = [f"{name} {value}" for name, value in (("pid", pid), ("port", port)) if value is not None]
        others = f" There is {_listed(servers)}." if servers else ""
        raise SwitchError(
            f"No server of yours with method double runs{' with ' if asked else ''}{' and '.join(asked)}.{others}"
        )
    return chosen


def switch(servers: Sequence[Server], enabled: bool, why: str) -> Server:
    """Turn the drafting of the one server off or on, from its next step on; returns its new state.

    Raises SwitchError if there are several, or if an engine did not answer.
    """
    if len(servers) > 1:
        raise SwitchError(f"There are several servers; choose one by --pid or --port: {_listed(servers)}.")
    server = servers[0]
    failed = []
    for engine in server.engines:
        try:
            answer = ask(Address(server.key, engine), {"enabled": enabled, "why": why}, _TIMEOUT_S)
            server.engines[engine] = answer.values
        except (OSError, ValueError) as error:
            failed.append(f"engine {engine} ({error})")
    if failed:
        raise SwitchError(f"These engines of {server} may not have been switched: {', '.join(failed)}.")
    return server


def _state(values: dict[str, Any]) -> str:
    if not values["enabled"]:
        return "off"
    if values["draft_failed"]:
        return "on, without the draft model, which cannot work here: see the log"
    paused_s = values["paused_seconds"]
    return f"on, but paused {values['paused_why']}; drafting is tried again in {paused_s:.0f} s" if paused_s else "on"


def _listed(servers: Sequence[Server]) -> str:
    return "; ".join(map(str, servers))


def _launcher(answer: Answer) -> int:
    pid = answer.process
    for _ in range(answer.values["generation"]):
        pid = parent(pid)
    return pid


def _is_within(pid: int, launcher: int) -> bool:
    """Whether the process is the launcher or descends from it."""
    while pid > 0 and pid != launcher:
        pid = parent(pid)
    return pid == launcher


def _listening_ports(pid: int) -> list[int]:
    files, ports = set(), set()
    with suppress(OSError):  # then the server is known by its pid only
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                files.add(str(entry.readlink()))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
                if state == _LISTENS and f"socket:[{inode}]" in files:
                    ports.add(int(local.rpartition(":")[2], 16))
    return sorted(ports)
