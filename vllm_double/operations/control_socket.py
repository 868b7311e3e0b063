"""Where a running engine answers questions of its own host: a socket in Linux's abstract namespace, which leaves nothing behind
whoever dies.

A question is one JSON object, or nothing; the answer is another object. Who asks and who answers is known from the kernel.
vLLM's own server would be no place for commands: its API keys guard some paths only, and are what its clients have.
"""

import json
import logging
import os
import pwd
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Address", "Answer", "Endpoint", "ask", "find"]

_logger = logging.getLogger(__name__)

_TIMEOUT_S = 1.0
_RETRY_S = 0.1
_LONGEST_QUESTION = 1 << 16
_PEER = struct.Struct("iII")  # process, user and group, as SO_PEERCRED gives them
_LISTED = re.compile(r" @vllm-double-([0-9a-f]+)-(\d+)$")


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """One engine of a server. ``key`` is the server's; hexadecimal digits."""

    key: str
    engine: int

    @property
    def name(self) -> str:
        return f"\0vllm-double-{self.key}-{self.engine}"


@dataclass(frozen=True, slots=True)
class Answer:
    """``process`` gave ``values``; it is 0 where it cannot be seen from here (in another container)."""

    process: int
    values: dict[str, Any]


class Endpoint:
    """Answers every connection from a thread that sleeps in between.

    answer: takes a command and who gives it ("user (process 7)"), or {} and "" where nothing is commanded. Commands are taken
    from the engine's own user; others are answered as if they had given none.
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
                    connection.settimeout(_TIMEOUT_S)
                    connection.sendall(json.dumps(self._answer(*_command(connection))).encode())
                except OSError:
                    continue
                except Exception:  # the next one may be answered
                    _logger.exception("A question to this engine found no answer")

    def close(self) -> None:
        """Stop answering."""
        self._closing.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def ask(address: Address, command: dict[str, Any] | None = None, timeout_s: float = _TIMEOUT_S) -> Answer:
    """Ask an engine; the timeout is for each wait.

    Raises OSError: nobody is there (any more), or stays silent (TimeoutError), or belongs to another user (PermissionError).
    ValueError: this is no answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(address.name)
        process, user = _peer(connection)
        if user != os.geteuid():
            raise PermissionError(f"Process {process} belongs to {_user_name(user)}, who alone may ask it.")
        if command is not None:
            connection.sendall(json.dumps(command).encode())
        connection.shutdown(socket.SHUT_WR)
        try:
            with connection.makefile("rb") as stream:
                return Answer(process, json.load(stream))
        except TimeoutError:
            raise TimeoutError(f"Process {process} does not answer.") from None


def find() -> list[Address]:
    """The engines of this host (of this network namespace, to be exact), whoever they belong to."""
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    found = [match for match in map(_LISTED.search, lines) if match is not None]
    return sorted({Address(match[1], int(match[2])) for match in found})


def _command(connection: socket.socket) -> tuple[dict[str, Any], str]:
    process, user = _peer(connection)
    if user != os.geteuid():
        return {}, ""
    question = b""
    while len(question) < _LONGEST_QUESTION and (more := connection.recv(_LONGEST_QUESTION)):
        question += more
    command = json.loads(question) if question else {}
    return command, f"{_user_name(user)} (process {process})" if command else ""


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end when it connected, or began to listen."""
    process, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return process, user


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
