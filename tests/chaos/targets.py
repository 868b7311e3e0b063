"""Starting chaos_target.py and watching it."""

from __future__ import annotations

import json
import os
import queue
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.chaos import MARKER, Run, possessions, still_there, wait_for
from vllm_double.hosting.settings import DraftSettings

HERE = Path(__file__).parent


class Target:
    """A running chaos_target.py and what it has said last."""

    def __init__(self, cwd: Path | None = None, **settings: Any) -> None:
        defaults = {
            "factory": "chaos_factory:build",
            "draft_cores": (max(os.sched_getaffinity(0)),),
            "visible_devices": "",
        }
        wanted = DraftSettings(**{**defaults, **settings})
        self.run = Run(secrets.token_hex(8))
        self.seen: dict[str, Any] = {}
        self.owned: set[str] = set()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "chaos_target.py"), wanted.to_json()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={**os.environ, MARKER: self.run.token, "PYTHONPATH": path},
        )
        self.log: list[str] = []
        streams = ((self.process.stdout, self._lines.put), (self.process.stderr, self.log.append))
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in streams]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, put: Callable[[str], None]) -> None:
        with stream:
            for line in stream:
                put(line)

    def wait_for(self, matches: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
        def look() -> bool:
            while not self._lines.empty():
                self.seen = json.loads(self._lines.get())
                if matches(self.seen):
                    return True
            return bool(self.seen) and matches(self.seen)

        wait_for(look, timeout_s, lambda: f"last seen: {self.seen}\n{''.join(self.log[-30:])}")
        self.look()
        return self.seen

    def look(self) -> None:
        """Takes note of what the run's processes own now."""
        self.owned |= possessions(self.run.processes())

    def left_behind(self) -> set[str]:
        """What of all that was seen to be this run's still exists. Look before the end."""
        self.look()
        return still_there(self.owned)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        try:
            self.run.wait_until_gone(15)
        finally:
            self.run.end()
            for reader in self._readers:
                reader.join(10)


def beating(seen: dict[str, Any]) -> bool:
    return seen["state"] == "up" and seen["beats"]
