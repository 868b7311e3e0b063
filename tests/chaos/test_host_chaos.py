"""Whatever of ours is killed comes back, and whatever end the target finds, nothing of ours stays."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.chaos import Process, all_processes, wait_for
from tests.chaos.targets import Target, beating

START_S = 180.0  # a start takes 4 s of CPU time, but CI machines can be very busy
END_S = 15.0
pytestmark = pytest.mark.integration
StartTarget = Callable[..., Target]


def test_a_killed_process_of_ours_comes_back_and_its_kin_are_gone(start_target: StartTarget) -> None:
    target = start_target()
    before = target.wait_for(beating, START_S)
    # By falling depth in the process tree: the actor alone is replaced, for all others the host is started
    # again.
    for role, new_host in (
        ("actor", False),
        ("raylet", True),
        ("gcs", True),
        ("driver", True),
        ("guard", True),
        ("host", True),
    ):
        old = {process.role: process for process in target.run.processes() if process.role != "agent"}
        target.run.kill(role)

        def back(seen: dict[str, Any], old_session: int = before["session"]) -> bool:
            return beating(seen) and seen["session"] not in (0, old_session)

        now = target.wait_for(back, START_S)
        assert (now["starts"] > before["starts"]) == new_host, f"after the {role} was killed"
        replaced = [p for name, p in old.items() if name != "other" and (new_host or name == "actor")]
        _wait_until_gone(replaced, role)
        assert target.process.poll() is None, f"the target died with the {role}"
        before = now
    assert len([path for path in target.left_behind() if path.count("/") == 2]) == 1, target.left_behind()


def test_the_death_of_either_rank_starts_both_again_and_leaves_no_segment(start_target: StartTarget) -> None:
    segments, before_all = Path("/dev/shm"), set(Path("/dev/shm").iterdir())
    target = start_target(factory="chaos_factory:build_rank", num_ranks=2, draft_cores=(0, max(os.sched_getaffinity(0))))
    before = target.wait_for(beating, START_S)
    for victim in (0, 1):
        old = sorted(target.run.by_role("actor"), key=lambda process: process.pid != before["actor_pid"])
        assert len(old) == 2
        os.kill(old[victim].pid, signal.SIGKILL)

        def back(seen: dict[str, Any], old_session: int = before["session"]) -> bool:
            return beating(seen) and seen["session"] not in (0, old_session)

        before = target.wait_for(back, START_S)
        _wait_until_gone(old, f"rank {victim}")
        assert before["starts"] == 1, "the host was started again"
    target.process.terminate()
    target.process.wait(END_S)
    target.run.wait_until_gone(END_S)
    wait_for(lambda: not set(segments.iterdir()) - before_all, END_S, lambda: f"left: {set(segments.iterdir()) - before_all}")


def _wait_until_gone(processes: list[Process], role: str) -> None:
    left: list[Process] = []

    def gone() -> bool:
        left[:] = [process for process in processes if process.alive()]
        return not left

    wait_for(gone, END_S, lambda: f"outlived the {role}: {left}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_nothing_is_left_after_the_target_ends_by(number: signal.Signals, start_target: StartTarget) -> None:
    target = start_target(factory="chaos_factory:build_with_openmp")
    target.wait_for(beating, START_S)
    assert target.run.by_role("actor"), "the run's processes are not found"
    assert target.left_behind(), "the run's folder is not found"
    os.kill(target.process.pid, number)
    target.process.wait(END_S)
    target.run.wait_until_gone(END_S)
    wait_for(lambda: not target.left_behind(), END_S, lambda: f"left: {target.left_behind()}")


def test_nothing_is_left_after_the_target_is_killed_while_ray_starts(start_target: StartTarget) -> None:
    target = start_target()
    wait_for(lambda: target.run.by_role("gcs"), START_S)
    assert target.left_behind(), "the run's folder is not found"
    target.process.kill()
    target.process.wait(END_S)
    target.run.wait_until_gone(END_S)
    wait_for(lambda: not target.left_behind(), END_S, lambda: f"left: {target.left_behind()}")


@pytest.mark.parametrize("role", ["guard", "host"])
def test_nothing_is_left_after_the_target_and_one_who_cleans_up_are_killed_together(
    start_target: StartTarget, role: str
) -> None:
    target = start_target()
    target.wait_for(beating, START_S)
    kill_together([target.process.pid, *(process.pid for process in target.run.by_role(role))])
    target.process.wait(END_S)
    target.run.wait_until_gone(END_S)
    wait_for(lambda: not target.left_behind(), END_S, lambda: f"left: {target.left_behind()}")


def test_nothing_is_left_after_all_descendants_of_the_target_are_killed_together(start_target: StartTarget) -> None:
    """As vLLM's API server does when it is told to stop."""
    target = start_target()
    target.wait_for(beating, START_S)
    family = {target.process.pid}
    while more := {process.pid for process in all_processes() if process.parent in family} - family:
        family |= more
    assert {process.pid for process in target.run.by_role("guard")} - family, "nobody is left to clean up"
    kill_together(sorted(family))
    target.process.wait(END_S)
    target.run.wait_until_gone(END_S)
    wait_for(lambda: not target.left_behind(), END_S, lambda: f"left: {target.left_behind()}")


def test_the_guard_cleans_up_after_a_target_that_ends_later_than_the_host(start_target: StartTarget) -> None:
    target = start_target(factory="chaos_factory:build_with_openmp")
    target.wait_for(beating, START_S)
    assert any(f"LIB_{target.process.pid}_" in path for path in target.left_behind()), "the target's mark is not found"
    os.kill(target.process.pid, signal.SIGSTOP)  # as one that takes long to die
    target.run.kill("host")
    wait_for(lambda: not target.run.by_role("driver"), END_S)
    target.process.kill()
    target.process.wait(END_S)
    target.run.wait_until_gone(END_S)
    wait_for(lambda: not target.left_behind(), END_S, lambda: f"left: {target.left_behind()}")


def test_the_folder_of_a_run_killed_as_a_whole_goes_with_the_next_start(start_target: StartTarget) -> None:
    first = start_target()
    first.wait_for(beating, START_S)
    kill_together([process.pid for process in first.run.processes()])
    first.process.wait(END_S)
    first.run.wait_until_gone(END_S)
    assert first.left_behind(), "somebody has cleaned up; this test shows nothing"
    second = start_target()
    second.wait_for(beating, START_S)
    second.process.terminate()
    second.process.wait(END_S)
    second.run.wait_until_gone(END_S)
    wait_for(lambda: not first.left_behind(), END_S, lambda: f"left: {first.left_behind()}")


def kill_together(pids: list[int]) -> None:
    """Stops them all first, so that none can act on another's death."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
