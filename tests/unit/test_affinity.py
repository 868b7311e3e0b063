from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_double.hosting.cores import Place, bind_all_threads, format_cores, parse_cores, read_topology, split_cores

FOUR_CORES_SMT = {cpu: Place(core=cpu % 4, node=0) for cpu in range(8)}  # 0 and 4 are one core, 1 and 5, ...
TWO_NODES = {cpu: Place(core=cpu, node=cpu // 4) for cpu in range(8)}


@given(st.sets(st.integers(0, 300), min_size=1))
def test_a_core_list_reads_back_what_was_written(cores: set[int]) -> None:
    assert parse_cores(format_cores(cores)) == tuple(sorted(cores))


def test_runs_are_written_as_ranges() -> None:
    assert format_cores([6, 3, 1, 2, 0, 8, 9]) == "0-3,6,8-9"
    assert format_cores([]) == "none"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no number"),
        ("a", "no number"),
        ("1,", "no number"),
        ("-1", "no number"),
        ("1-2-3", "no number"),
        ("3-1", "backwards"),
        ("0-3,2", "Core 2 is named twice"),
    ],
)
def test_a_wrong_core_list_is_refused_with_one_sentence(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        parse_cores(text)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_the_draft_gets_the_last_core_and_the_target_the_others() -> None:
    split = split_cores(range(4))
    assert (split.target, split.draft, split.bind, split.shared) == (((0, 1, 2),), (3,), "0-2", False)
    assert split_cores(range(2)).bind == "0"


def test_only_allowed_cores_are_given_away() -> None:
    split = split_cores([3, 5, 9])
    assert (split.target, split.draft) == (((3, 5),), (9,))


def test_the_draft_gets_a_physical_core_and_the_target_one_thread_of_each_other() -> None:
    split = split_cores(range(8), topology=FOUR_CORES_SMT)
    assert (split.target, split.draft) == (((4, 5, 6),), (7,))


def test_a_named_draft_core_keeps_its_hyperthread_from_the_target() -> None:
    assert split_cores(range(8), draft="0", topology=FOUR_CORES_SMT).target == ((5, 6, 7),)


def test_each_rank_gets_a_memory_node() -> None:
    split = split_cores(range(8), num_ranks=2, topology=TWO_NODES)
    assert (split.bind, split.draft) == ("0-3|4-6", (7,))


def test_ranks_share_one_memory_node_evenly() -> None:
    assert split_cores(range(7), num_ranks=2).bind == "0-2|3-5"


def test_one_core_is_shared_and_said_so() -> None:
    split = split_cores([2])
    assert (split.target, split.draft, split.shared, split.bind) == (((2,),), (2,), True, "2")
    assert "(shared)" in split.describe()


def test_each_engine_gets_its_part_of_the_targets_and_the_drafts_cores() -> None:
    split = split_cores(range(12), num_ranks=4, num_draft=4)
    parts = [split.of_engine(index, 2) for index in (0, 1)]
    assert [part.target for part in parts] == [((0, 1), (2, 3)), ((4, 5), (6, 7))]
    assert [part.draft for part in parts] == [(8, 9), (10, 11)]
    assert [part.bind for part in parts] == ["0-1|2-3", "4-5|6-7"]
    assert split.of_engine(0, 1) == split
    assert split_cores(range(4), target="nobind", num_ranks=2, num_draft=2).of_engine(1, 2).bind == "nobind"


def test_the_two_threads_of_one_core_are_divided_and_said_to_be_shared() -> None:
    split = split_cores([0, 4], topology=FOUR_CORES_SMT)
    assert (split.target, split.draft, split.shared) == (((0,),), (4,), True)


def test_the_users_own_binding_is_kept_and_the_draft_avoids_it() -> None:
    split = split_cores(range(4), target="2-3")
    assert (split.bind, split.draft, split.shared) == ("2-3", (1,), False)


def test_an_overlap_with_the_users_binding_is_said() -> None:
    assert split_cores(range(4), target="0-3").shared
    assert split_cores(range(4), target="0-1", draft="1").shared
    assert split_cores(range(4), target="nobind").bind == "nobind"
    assert split_cores(range(4), target="nobind").shared


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"draft": "7"}, "asks for core 7, but this process may only use cores 0-3"),
        ({"draft": "0-3"}, "leave 0 of 4 allowed cores to 1 target worker"),
        ({"num_draft": 4}, "need 5 physical cores"),
        ({"num_draft": 0}, "at least one core"),
        ({"num_ranks": 4}, "need 5 physical cores"),
        ({"target": "0|1"}, "names 2 rank"),
        ({"target": "9"}, "target asks for core 9"),
        ({"target": "0-2", "num_draft": 2}, "leaves it only 3"),
    ],
    ids=str,
)
def test_an_impossible_split_is_refused_with_one_sentence(arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        split_cores(range(4), **arguments)  # type: ignore[arg-type]
    assert str(caught.value).endswith(".")


@given(st.sets(st.integers(0, 63), min_size=3), st.integers(1, 2), st.booleans())
def test_target_and_draft_are_disjoint_and_inside_what_is_allowed(allowed: set[int], num_ranks: int, smt: bool) -> None:
    topology = {cpu: Place(core=cpu % 32 if smt else cpu, node=cpu % 2) for cpu in range(64)}
    try:
        split = split_cores(allowed, num_ranks=num_ranks, topology=topology)
    except ValueError:
        assert len({topology[cpu].core for cpu in allowed}) < 1 + num_ranks
        return
    given_away = [cpu for rank in split.target for cpu in rank] + list(split.draft)
    assert set(given_away) <= allowed
    assert split.shared or len(set(given_away)) == len(given_away)
    assert all(split.target)
    assert [parse_cores(part) for part in split.bind.split("|")] == list(split.target)


def test_the_topology_is_read_from_sysfs(tmp_path: Path) -> None:
    for cpu, siblings, node in ((0, "0,2", 0), (1, "1,3", 1), (2, "0,2", 0), (3, "1,3", 1)):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(f"{siblings}\n")
        (tmp_path / f"cpu{cpu}/node{node}").mkdir()
    (tmp_path / "cpu4").mkdir()  # offline
    assert read_topology(tmp_path) == {0: Place(0, 0), 1: Place(1, 1), 2: Place(0, 0), 3: Place(1, 1)}


def test_all_threads_of_a_process_are_bound() -> None:
    before = os.sched_getaffinity(0)
    seen: list[set[int]] = []
    may_look, may_end = threading.Event(), threading.Event()

    def other() -> None:
        may_look.wait()
        seen.append(os.sched_getaffinity(0))
        may_end.wait()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        bind_all_threads([min(before)])
        may_look.set()
        may_end.set()
        thread.join()
        assert seen == [{min(before)}]
    finally:
        may_look.set()
        may_end.set()
        bind_all_threads(before)
    assert os.sched_getaffinity(0) == before
