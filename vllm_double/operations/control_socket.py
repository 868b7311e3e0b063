"""The control socket of a running engine, in Linux's abstract namespace: nothing is left behind if a process is killed.

A request is one JSON object, or nothing; the answer is another object. The kernel says which process and user sent either.
vLLM's own server would be the wrong place for commands: its API keys guard some paths only, and its clients have them.
"""

import json
import logging
import os
import pwd
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Address", "Answer", "Endpoint", "ask", "find"]

_logger = logging.getLogger(__name__)

_TIMEOUT_S = 1.0
_RETRY_S = 0.1
_GAP_S = 0.01
_LONGEST_REQUEST = 1 << 16
_PEER = struct.Struct("iII")  # process, user and group, as SO_PEERCRED gives them
_LISTED = re.compile(r" @vllm-double-([0-9a-f]+)-(\d+)$")


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """One engine of a server. key: of the server, hexadecimal digits."""

    key: str
    engine: int

    @property
    def name(self) -> str:
        return f"\0vllm-double-{self.key}-{self.engine}"


@dataclass(frozen=True, slots=True)
class Answer:
    """process: that sent ``values``; 0 if it cannot be seen from here (in another container)."""

    process: int
    values: dict[str, Any]


class Endpoint:
    """Answers connections of this process's user, in a thread, one every ``_GAP_S`` seconds at most: each takes time from the
    engine. Others are sent away before anything is read or computed, and count, too.

    answer: takes a command and its sender ("user (process 7)"), or {} and "" if there is no command.
    """

    def __init__(self, address: Address, answer: Callable[[dict[str, Any], str], dict[str, Any]]) -> None:
        self._answer = answer
        self._closing = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(address.name)
        self._socket.listen(8)
        threading.Thread(target=self._serve, name="double-endpoint", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed, or out of file descriptors for a moment
                if self._closing.wait(_RETRY_S):
                    return
                continue
            with connection:
                try:
                    process, user = _peer(connection)
                    if user == os.geteuid():
                        connection.settimeout(_TIMEOUT_S)
                        command = _command(connection)
                        who = f"{_user_name(user)} (process {process})" if command else ""
                        connection.sendall(json.dumps(self._answer(command, who)).encode())
                except OSError:
                    pass
                except Exception:  # the next one may be answered
                    _logger.exception("A request to the control socket failed")
            if self._closing.wait(_GAP_S):
                return

    def close(self) -> None:
        """Stop answering."""
        self._closing.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def ask(address: Address, command: dict[str, Any] | None = None, timeout_s: float = _TIMEOUT_S) -> Answer:
    """Send a command, or none, to an engine and return the answer. timeout_s: for each wait.

    Raises OSError if there is no engine, TimeoutError if it does not answer, PermissionError if it belongs to another user, and
    ValueError if the answer cannot be read.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        _connect(connection, address, time.monotonic() + timeout_s)
        process, user = _peer(connection)
        if user != os.geteuid():
            raise PermissionError(f"Process {process} belongs to {_user_name(user)}, who alone may send requests to it.")
        if command is not None:
            connection.sendall(json.dumps(command).encode())
        connection.shutdown(socket.SHUT_WR)
        try:
            with connection.makefile("rb") as stream:
                return Answer(process, json.load(stream))
        except TimeoutError:
            raise TimeoutError(f"Process {process} does not answer.") from None


def _connect(connection: socket.socket, address: Address, deadline: float) -> None:
    while True:
        try:
            return connection.connect(address.name)
        except BlockingIOError:  # others are in line
            if time.monotonic() > deadline:
                raise TimeoutError("Too many processes ask this engine.") from None
            time.sleep(_GAP_S / 4)


def find() -> list[Address]:
    """The engines of all users in this network namespace."""
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    found = [match for match in map(_LISTED.search, lines) if match is not None]
    return sorted({Address(match[1], int(match[2])) for match in found})


def _command(connection: socket.socket) -> dict[str, Any]:
    request = b""
    while len(request) < _LONGEST_REQUEST and (more := connection.recv(_LONGEST_REQUEST)):
        request += more
    command: dict[str, Any] = json.loads(request) if request else {}
    return command


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user that connected, or began to listen, on the other side."""
    process, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return process, user


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
