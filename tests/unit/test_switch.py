"""The command that turns drafting off and on, from the command line to an engine's endpoint."""

import errno
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_double.cli import main
from vllm_double.operations import control_socket as endpoint
from vllm_double.operations import switch
from vllm_double.operations.control_socket import Address, Endpoint, ask, find

ROOT = Path(__file__).resolve().parents[2]
Processes = list[subprocess.Popen[Any]]
OnTheSpot = Callable[..., "FakeEngine"]

# A server whose engines live in a child, as vLLM's do: it listens, prints its port and its child's pid, and lasts until its
# input ends.
SERVER = """
import os, socket, sys, time
from tests.unit.test_switch import FakeEngine
listener = socket.create_server(("127.0.0.1", 0))
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    listener.close()
    engines = [FakeEngine(sys.argv[1], number, generation=1) for number in range(int(sys.argv[2]))]
    os.write(writing, b"x")
    sys.stdin.read()
    os._exit(0)
os.read(reading, 1)
print(listener.getsockname()[1], child, flush=True)
sys.stdin.read()
os.waitpid(child, 0)
"""


class FakeEngine:
    """An engine that knows only its switch."""

    def __init__(self, key: str, number: int = 0, generation: int = 0, paused_s: float = 0.0, why: str = "") -> None:
        self.enabled = True
        self.commands: list[tuple[dict[str, Any], str]] = []
        calibration = [("draft", 0, 0.4, 0.381, 812.0), ("context", 3, 0.95, 0.9, 20.0)]
        self._rest = {"generation": generation, "paused_seconds": paused_s, "paused_why": why, "calibration": calibration}
        self.draft_failed = False
        self._endpoint = Endpoint(Address(key, number), self._answer)
        self.close = self._endpoint.close

    def _answer(self, command: dict[str, Any], who: str) -> dict[str, Any]:
        if command:
            self.commands.append((command, who))
            self.enabled = command["enabled"]
        return {"enabled": int(self.enabled), "draft_failed": int(self.draft_failed), **self._rest}


@pytest.fixture(autouse=True)
def only_ours(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Keys that the test has made; other servers of this machine are none of its business."""
    keys: set[str] = set()
    monkeypatch.setattr(switch, "find", lambda: [address for address in find() if address.key in keys])
    return keys


@pytest.fixture
def engine(only_ours: set[str]) -> Iterator[OnTheSpot]:
    """Makes engines in this very process."""
    made: list[FakeEngine] = []

    def make(**settings: Any) -> FakeEngine:
        key = settings.pop("key", None) or secrets.token_hex(8)
        only_ours.add(key)
        made.append(FakeEngine(key, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def server(only_ours: set[str], processes: Processes) -> Callable[..., tuple[int, int, int]]:
    """Starts servers; each gives (pid, port, pid of its child)."""

    def start(engines: int = 1) -> tuple[int, int, int]:
        key = secrets.token_hex(8)
        only_ours.add(key)
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, key, str(engines)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        processes.append(process)
        assert process.stdout is not None
        port, child = map(int, process.stdout.readline().split())
        return process.pid, port, child

    return start


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["switch", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_single_server_need_not_be_named(engine: OnTheSpot, capsys: pytest.CaptureFixture[str]) -> None:
    one = engine()
    assert run(capsys, "status") == (0, f"pid {os.getpid()}: on\n", "")
    assert run(capsys, "off", "--reason", "ticket 12") == (0, f"pid {os.getpid()}: off\n", "")
    assert not one.enabled
    assert run(capsys, "status") == (0, f"pid {os.getpid()}: off\n", "")
    assert run(capsys, "on") == (0, f"pid {os.getpid()}: on\n", "")
    (off, who), (on, _) = one.commands
    assert off == {"enabled": False, "why": "ticket 12"} and on == {"enabled": True, "why": ""}
    assert who.endswith(f" (process {os.getpid()})")


def test_servers_are_told_apart_by_process_and_port(
    server: Callable[..., tuple[int, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    (pid, port, child), (other, other_port, _) = server(), server(engines=2)
    lines = {f"pid {pid}, port {port}: on", *(f"pid {other}, port {other_port}, engine {engine}: on" for engine in (0, 1))}
    code, out, err = run(capsys, "status")
    assert (code, set(out.splitlines()), err) == (0, lines, "")
    code, out, err = run(capsys, "off")
    assert code == 1 and out == "" and f"pid {pid}, port {port}" in err and f"pid {other}, port {other_port}" in err
    assert run(capsys, "off", "--port", other_port)[0] == 0
    assert run(capsys, "status", "--pid", pid)[1] == f"pid {pid}, port {port}: on\n"
    assert run(capsys, "status", "--pid", child)[1] == f"pid {pid}, port {port}: on\n"
    assert run(capsys, "status", "--pid", other)[1].count(": off\n") == 2
    assert run(capsys, "off", "--pid", child)[1] == f"pid {pid}, port {port}: off\n"
    assert run(capsys, "on", "--pid", pid, "--port", other_port)[0] == 1


def test_a_server_that_is_not_there_is_an_error_and_others_stay_as_they_are(
    engine: OnTheSpot, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "status") == (1, "", "vllm-double: No server of yours with method double runs.\n")
    one = engine()
    code, _, err = run(capsys, "off", "--port", 1)
    assert code == 1 and err == (
        f"vllm-double: No server of yours with method double runs with port 1. There is pid {os.getpid()}.\n"
    )
    assert run(capsys, "off", "--pid", os.getppid())[0] == 1
    assert one.enabled and one.commands == []


def test_a_pause_is_shown_with_its_reason(engine: OnTheSpot, capsys: pytest.CaptureFixture[str]) -> None:
    engine(paused_s=36.6, why="after an exception")
    assert "on, but paused after an exception; drafting is tried again in 37 s" in run(capsys, "status")[1]


def test_the_calibration_is_shown_if_it_is_asked_for(engine: OnTheSpot, capsys: pytest.CaptureFixture[str]) -> None:
    engine()
    assert run(capsys, "status", "--calibration")[1].splitlines() == [
        f"pid {os.getpid()}: on",
        "    draft, greedy: from 0.40 on it was right 0.381 of 812 times",
        "    context, T <= 1.2: from 0.95 on it was right 0.900 of 20 times",
    ]


def test_a_silent_engine_is_named_and_the_others_are_shown(
    engine: OnTheSpot, only_ours: set[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switch, "_TIMEOUT_S", 0.05)
    engine()
    silent = Address(secrets.token_hex(8), 0)
    only_ours.add(silent.key)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(silent.name)
        listener.listen()
        code, out, err = run(capsys, "status")
    assert code == 0 and out == f"pid {os.getpid()}: on\n"
    assert err == f"vllm-double: Process {os.getpid()} does not answer.\n"


def test_an_engine_that_does_not_answer_counts_as_not_switched(
    engine: OnTheSpot, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = secrets.token_hex(8)
    first, second = engine(key=key), engine(key=key, number=1)
    answers = ask

    def ask_one(address: Address, command: dict[str, Any] | None = None, timeout_s: float = 1.0) -> endpoint.Answer:
        if command is not None and address.engine == 0:
            raise TimeoutError("silence")
        return answers(address, command, timeout_s)

    monkeypatch.setattr(switch, "ask", ask_one)
    code, out, err = run(capsys, "off")
    assert code == 1 and out == "" and "engine 0 (silence)" in err
    assert first.enabled and not second.enabled


def test_the_endpoint_answers_on_after_a_command_that_cannot_be_read(
    engine: OnTheSpot, caplog: pytest.LogCaptureFixture
) -> None:
    key = secrets.token_hex(8)
    one = engine(key=key)
    for wrong in (b"not JSON", b'{"turn": "off"}'):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(Address(key, 0).name)
            connection.sendall(wrong)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    assert ask(Address(key, 0)).values["enabled"] == 1 and one.enabled
    assert caplog.text.count("A request to the control socket failed") == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
def test_another_user_is_sent_away_before_anything_is_computed() -> None:
    key, asked = secrets.token_hex(8), []
    endpoint = Endpoint(Address(key, 0), lambda command, who: {"asked": asked.append(command)})
    program = f"""
import os, socket
from vllm_double.operations.control_socket import Address, ask
os.setuid(65534)
address = Address({key!r}, 0)
try:
    ask(address, {{"enabled": False, "why": ""}})
except PermissionError as error:
    print(error)
for request in (b'{{"enabled": false, "why": ""}}', b""):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address.name)
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            print(connection.recv(1 << 16))
        except OSError:
            print(b"")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    refused, *answers = done.stdout.splitlines()
    assert refused.startswith(f"Process {os.getpid()} belongs to ") and answers == ["b''", "b''"]
    assert asked == []
    ask(Address(key, 0))
    endpoint.close()
    assert asked == [{}]


def test_many_polls_take_little_of_the_engines_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_GAP_S", 0.05)
    key, asked = secrets.token_hex(8), []
    polled = Endpoint(Address(key, 0), lambda command, who: {"asked": asked.append(time.monotonic())})
    threads = [threading.Thread(target=ask, args=(Address(key, 0), None, 10.0)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    polled.close()
    assert len(asked) == 20, "more than the socket's line is long, and all come in turn"
    assert asked[-1] - asked[0] >= 19 * 0.05


def test_the_endpoint_answers_a_request_without_a_command_and_is_found_until_it_is_closed() -> None:
    key = secrets.token_hex(8)
    numbers = Endpoint(Address(key, 3), lambda command, who: {"command": command, "who": who})
    answer = ask(Address(key, 3))
    assert answer.process == os.getpid() and answer.values == {"command": {}, "who": ""}
    assert Address(key, 3) in find()
    numbers.close()
    with pytest.raises(OSError, match="refused"):
        ask(Address(key, 3))


def test_an_endpoint_that_could_not_accept_once_answers_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    key, accept = secrets.token_hex(8), socket.socket.accept
    endpoint = Endpoint(Address(key, 0), lambda command, who: {"is": "there"})

    def fail_once(self: socket.socket) -> Any:
        monkeypatch.setattr(socket.socket, "accept", accept)
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(socket.socket, "accept", fail_once)
    assert [ask(Address(key, 0)).values for _ in range(2)] == [{"is": "there"}] * 2
    assert socket.socket.accept is accept, "it never failed"
    endpoint.close()
