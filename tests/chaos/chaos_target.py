"""Stands for the target's worker process: holds the target's end and the supervisor, and prints what it sees.

One JSON line whenever something changes: state, starts, session, actor's pid, and whether the heart of this
session beats.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from vllm_double.hosting.settings import DraftSettings
from vllm_double.hosting.supervisor import DraftSupervisor
from vllm_double.transport.shared import SharedTargetChannel


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    end = SharedTargetChannel(1 << 16, 1 << 16)
    settings = replace(DraftSettings.from_json(sys.argv[1]), engine_pids=(os.getpid(),))
    if settings.factory.endswith("openmp"):  # as Intel's OpenMP does
        Path(f"/dev/shm/__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}").touch()
    supervisor = DraftSupervisor(settings, end.address)
    seen: dict[str, object] = {}
    session, first_beat = 0, 0
    while True:
        if end.session != session:
            session, first_beat = end.session, end.heartbeat
        now: dict[str, object] = {
            "state": supervisor.state,
            "starts": supervisor.starts,
            "actor_pid": supervisor.actor_pid,
            "session": session,
            "beats": bool(session) and end.heartbeat > first_beat + 3,
        }
        if now != seen:
            seen = now
            print(json.dumps(now), flush=True)
        time.sleep(0.01)


if __name__ == "__main__":
    main()
