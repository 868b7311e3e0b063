from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_double.config import DoubleConfig
from vllm_double.draft.engine.config import EngineConfig
from vllm_double.hosting import process_care
from vllm_double.hosting.back_off import BackOff
from vllm_double.hosting.host import MARK
from vllm_double.hosting.settings import DraftSettings
from vllm_double.hosting.supervisor import DraftSupervisor, child_environment

LIMIT_S = 10.0
ROOT = Path(__file__).parents[2]


class FakeHost:
    """Says ``lines``, and lives ``lasts_s`` of fake time; None: until it is stopped."""

    def __init__(self, world: World, lines: list[str], lasts_s: float | None) -> None:
        self._world = world
        self._lines = lines
        self._lasts_s = lasts_s
        self._stopped = threading.Event()

    def wait(self, on_line: Callable[[str], None]) -> None:
        for line in self._lines:
            on_line(line)
        if self._lasts_s is None:
            self._world.running.set()
            assert self._stopped.wait(LIMIT_S), "nobody stopped the host"
            return
        self._world.now += self._lasts_s

    def stop(self, timeout_s: float) -> None:
        self._stopped.set()


class World:
    """Time and processes for one supervisor."""

    def __init__(self, *lives: tuple[list[str], float]) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.running = threading.Event()
        self._lives = iter(lives)

    def spawn(self, settings: DraftSettings, address: str) -> FakeHost:
        lines, lasts_s = next(self._lives, ([said(state="up", actor_pid=7)], None))
        return FakeHost(self, lines, lasts_s)

    def pause(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        self.now += seconds
        return False

    def supervise(self, **settings: object) -> DraftSupervisor:
        return DraftSupervisor(
            DraftSettings(**settings),  # type: ignore[arg-type]
            "1:2:3",
            spawn=self.spawn,
            clock=lambda: self.now,
            pause=self.pause,
        )

    def wait_until_running(self) -> None:
        assert self.running.wait(LIMIT_S), "the host that stays was never started"


def said(text: str = "", **values: object) -> str:
    return MARK + json.dumps({"level": "INFO", "text": text} | values)


@pytest.fixture
def stop_at_end() -> Iterator[list[DraftSupervisor]]:
    supervisors: list[DraftSupervisor] = []
    yield supervisors
    for supervisor in supervisors:
        supervisor.stop()


def test_a_host_that_keeps_dying_is_started_ever_later(stop_at_end: list[DraftSupervisor]) -> None:
    world = World(*[([], 0.1)] * 8)
    stop_at_end.append(supervisor := world.supervise())
    world.wait_until_running()
    assert world.pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert (supervisor.starts, supervisor.restarts) == (9, 0)


def test_a_healthy_run_makes_the_next_start_quick_again(stop_at_end: list[DraftSupervisor]) -> None:
    world = World(([], 1), ([], 1), ([], 60), ([], 59))
    stop_at_end.append(world.supervise())
    world.wait_until_running()
    assert world.pauses == [1, 2, 1, 2]


def test_the_state_follows_what_the_host_says(stop_at_end: list[DraftSupervisor]) -> None:
    world = World()
    stop_at_end.append(supervisor := world.supervise())
    world.wait_until_running()
    assert (supervisor.state, supervisor.actor_pid) == ("up", 7)
    supervisor.stop()
    assert supervisor.state == "stopped"
    assert not supervisor._thread.is_alive()


def test_stop_during_a_pause_ends_the_waiting() -> None:
    supervisor = DraftSupervisor(DraftSettings(), "1:2:3", spawn=World(*[([], 0.0)] * 99).spawn)
    supervisor.stop()
    assert not supervisor._thread.is_alive()
    assert supervisor.starts <= 1


def test_only_messages_and_warnings_reach_the_log(stop_at_end: list[DraftSupervisor], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm_double.hosting.supervisor")
    lines = [
        "INFO chatter",
        "no level at all",
        "WARNING 11-21 a worry",
        said("a message"),
        said(state="up"),
        said(is_last=True),
    ]
    world = World((lines, 100.0))
    stop_at_end.append(world.supervise(double=DoubleConfig(draft_device="cpu"), draft_cores=(1,), target_cores="0"))
    world.wait_until_running()
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "Starting the draft worker's host: draft on cpu, cores 1; target on cores 0."
    assert messages[1:3] == ["(draft) WARNING 11-21 a worry", "(draft) a message"]
    assert not any("chatter" in message for message in messages)


def test_the_last_lines_of_a_host_that_ends_without_a_word_are_shown(
    stop_at_end: list[DraftSupervisor], caplog: pytest.LogCaptureFixture
) -> None:
    explained = ["Ray's chatter", said("Ray cannot be started", is_last=True)]
    world = World((["Traceback", "KeyError: 3"], 0.0), (explained, 0.0))
    stop_at_end.append(world.supervise())
    world.wait_until_running()
    assert caplog.text.count("Its last lines were") == 1
    assert "Traceback\nKeyError: 3" in caplog.text


def test_a_draft_that_cannot_work_is_given_up_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "vllm_double.hosting.supervisor")
    world = World(([said("It cannot work.", level="ERROR", state="failed", is_last=True)], 1.0))
    supervisor = world.supervise()
    supervisor._thread.join(LIMIT_S)
    assert (supervisor.state, supervisor.starts, world.pauses) == ("failed", 1, [])
    assert [record.getMessage() for record in caplog.records] == ["(draft) It cannot work."]
    supervisor.stop()


class HTTPError(OSError):
    """As a library's."""


@pytest.mark.parametrize(
    ("error", "reason", "is_final"),
    [
        (ValueError("page_size is 7.\n  It must be 32."), "page_size is 7. It must be 32", True),
        (KeyError("model.layers.3"), "KeyError: 'model.layers.3'", True),
        (FileNotFoundError("no config"), "FileNotFoundError: no config", True),
        (RuntimeError("whatever it is"), "RuntimeError: whatever it is", None),
        (MemoryError(), "MemoryError: ", False),
        (ConnectionRefusedError("by the hub"), "ConnectionRefusedError: by the hub", False),
        (HTTPError("503"), "HTTPError: 503", False),
    ],
)
def test_an_error_of_a_build_is_told_from_one_that_passes(error: Exception, reason: str, is_final: bool | None) -> None:
    from vllm_double.hosting.actor import BuildError

    found = pickle.loads(pickle.dumps(BuildError.of(error)))
    assert (str(found), found.is_final) == (reason, is_final)


def test_a_forked_child_does_not_stop_its_parents_host(stop_at_end: list[DraftSupervisor]) -> None:
    world = World()
    stop_at_end.append(supervisor := world.supervise())
    world.wait_until_running()
    supervisor._owner += 1  # as it looks from any other process
    supervisor.stop()
    assert supervisor.state == "up"
    supervisor._owner -= 1


def test_the_child_loses_bindings_and_a_foreign_ray_and_keeps_the_rest() -> None:
    inherited = {
        "LD_PRELOAD": "libiomp5.so",
        "KMP_AFFINITY": "explicit",
        "OMP_NUM_THREADS": "9",
        "OMP_PLACES": "{0}",
        "GOMP_CPU_AFFINITY": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "RAY_ADDRESS": "elsewhere:1",
        "CUDA_VISIBLE_DEVICES": "0",
        "HOME": "/home/x",
    }
    settings = DraftSettings(draft_cores=(2, 3), visible_devices="1")
    child = child_environment(inherited, settings)
    assert child["OMP_NUM_THREADS"] == "2"
    assert child["CUDA_VISIBLE_DEVICES"] == "1"
    assert child["LD_PRELOAD"] == "libiomp5.so"
    assert child["HOME"] == "/home/x"
    gone = {"KMP_AFFINITY", "OMP_PLACES", "GOMP_CPU_AFFINITY", "VLLM_CPU_OMP_THREADS_BIND", "RAY_ADDRESS"}
    assert not gone & child.keys()
    assert child["RAY_AUTH_MODE"] == "token"
    assert len(child["RAY_AUTH_TOKEN"]) == 64
    assert child["RAY_AUTH_TOKEN"] != child_environment(inherited, settings)["RAY_AUTH_TOKEN"]


def test_a_given_cluster_keeps_its_own_ray_settings() -> None:
    child = child_environment({"RAY_AUTH_TOKEN": "theirs"}, DraftSettings(double=DoubleConfig(ray_address="a:1")))
    assert child["RAY_AUTH_TOKEN"] == "theirs"
    assert "RAY_AUTH_MODE" not in child


def test_settings_survive_the_way_to_the_host() -> None:
    settings = DraftSettings(
        double=DoubleConfig(datastore="a", ray_address="a:1"),
        engine=EngineConfig("m", seed=7),
        datastores=(("a", "ff"),),
        draft_cores=(1, 2),
        engine_pids=(3,),
    )
    assert DraftSettings.from_json(settings.to_json()) == settings


def test_back_off_never_exceeds_its_limit() -> None:
    back_off = BackOff(first_s=1, most_s=5, healthy_s=10)
    assert [back_off.after(0, came_up=False) for _ in range(5)] == [1, 2, 4, 5, 5]
    assert back_off.after(10, came_up=False) == 1


def test_what_came_up_is_back_soon_however_often_it_dies() -> None:
    back_off = BackOff(first_s=1, most_s=60, most_after_up_s=5, healthy_s=60)
    assert [back_off.after(20, came_up=True) for _ in range(6)] == [1, 2, 4, 5, 5, 5]
    assert [back_off.after(20, came_up=False) for _ in range(3)] == [10, 20, 40]


def test_restarts_are_workers_that_came_up_again(stop_at_end: list[DraftSupervisor]) -> None:
    lines = [said(state="up", actor_pid=pid) for pid in (1, 1, 2)]
    lines.insert(1, said(state="unresponsive", actor_pid=1))
    world = World((lines, 30.0))
    stop_at_end.append(supervisor := world.supervise())
    world.wait_until_running()
    assert (supervisor.workers_up, supervisor.restarts, world.pauses) == (3, 2, [1])


def test_supervising_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys, vllm_double.hosting.supervisor; print([name for name in ('ray', 'torch', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_a_stale_folder_goes_and_a_living_owners_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_care.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(process_care.RuntimeFolder, "_LONGEST", 4096)
    stale = process_care.RuntimeFolder()
    os.close(stale.lock)  # as after the death of all its owners
    living = process_care.RuntimeFolder()
    assert not Path(stale.path).exists()
    process_care.RuntimeFolder.remove_stale(str(tmp_path))
    assert Path(living.path).exists()
    living.remove()
    living.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_session_is_killed_with_its_orphans() -> None:
    script = "import os, subprocess; subprocess.Popen(['sleep', '600']); os._exit(0)"
    leader = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    assert leader.wait(LIMIT_S) == 0
    assert len(process_care.session_members(leader.pid)) == 1
    process_care.kill_session(leader.pid)
    assert process_care.session_members(leader.pid) == []


def test_a_host_that_cannot_be_watched_is_followed_by_another(
    stop_at_end: list[DraftSupervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(([], 0.0))
    wait = FakeHost.wait

    def fail_once(self: FakeHost, on_line: Callable[[str], None]) -> None:
        monkeypatch.setattr(FakeHost, "wait", wait)
        raise RuntimeError("somebody cleaned up at the same time")

    monkeypatch.setattr(FakeHost, "wait", fail_once)
    stop_at_end.append(supervisor := world.supervise())
    world.wait_until_running()
    assert supervisor.starts == 2


def test_unlinked_shared_memory_stays_usable_and_leaves_no_name() -> None:
    code = (
        "import os\n"
        "from multiprocessing import resource_tracker, shared_memory\n"
        "from pathlib import Path\n"
        "from vllm_double.hosting.process_care import unlink_shared_memory\n"
        "segment = shared_memory.SharedMemory(create=True, size=4096)\n"
        "resource_tracker.unregister(segment._name, 'shared_memory')\n"
        "paths = [Path('/dev/shm', segment.name), Path(f'/dev/shm/__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}')]\n"
        "paths[1].touch()\n"
        "unlink_shared_memory()\n"
        "segment.buf[0] = 7\n"
        "print(segment.buf[0], [path.exists() for path in paths])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "7 [False, False]"


def test_openmp_marks_of_living_processes_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process_care, "_openmp_mark", lambda pid: tmp_path / str(pid))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(LIMIT_S)
    for pid in (os.getpid(), ended.pid):
        (tmp_path / str(pid)).touch()
    process_care.remove_openmp_marks([os.getpid(), ended.pid])
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]
