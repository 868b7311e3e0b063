"""The harness's pure functions: quantiles, ratios, looping text, rows, metrics, arms, cost line."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import rows
from benchmarks.arms import Arm, Choices, default_arms, variants
from benchmarks.client import Completion, Request, Round
from benchmarks.cost import fit, layers_for
from benchmarks.harness import Series
from benchmarks.load import poisson, row_of
from benchmarks.machine import parse_cores
from benchmarks.metrics import counters, speculation
from benchmarks.parity import divergences
from benchmarks.plots import USUAL, latest, over_batch, reliability
from benchmarks.run import Cell, arguments, ask_for, cell_rows, portable
from benchmarks.server import MARK, Server, ServerConfig, ServerError, family
from benchmarks.stats import first_difference, is_looping, median_ratio, quantile, quiet_median, share
from benchmarks.workload import load_prompts

CHOICES = Choices(Path("/models/draft"), (0, 1), ngram_k=(2, 4), draft_k=(3,), double_k=(16,))


def completion(tokens: list[int], text: str = "", finish_reason: str = "length") -> Completion:
    return Completion("p", tokens, text, finish_reason, 0.1, 1.0, [0.1, 0.2])


def test_arrivals_are_the_same_each_time_and_as_frequent_as_wanted() -> None:
    times = poisson(4000, 2.0)
    assert times == poisson(4000, 2.0) and times == sorted(times)
    assert times[-1] == pytest.approx(2000, rel=0.05)


def test_a_row_of_load_compares_quantiles_with_those_of_plain() -> None:
    plain, ours = Series(Arm("plain")), Series(Arm("double"))
    for series, seconds in ((plain, 1.0), (ours, 0.5)):
        done = [Completion("p", [1], "x", "stop", seconds * first, 4 * seconds * first) for first in (0.1, 0.2, 0.3)]
        series.rounds.append(Round(done, 2.0))
    row = row_of(ours, plain)
    assert row["first_token_s_p50"] == pytest.approx(0.1) and row["first_token_p99_over_plain"] == pytest.approx(0.5)
    assert row["latency_p50_over_plain"] == pytest.approx(0.5) and row["identical"] == 1.0
    assert row["in_flight"] == pytest.approx(0.6)


@pytest.mark.parametrize(("fraction", "wanted"), [(0, 1), (0.2, 1.8), (0.5, 3), (0.8, 4.2), (1, 5)])
def test_quantile_interpolates_between_order_statistics(fraction: float, wanted: float) -> None:
    assert quantile([5, 1, 4, 2, 3], fraction) == pytest.approx(wanted)


def test_quiet_median_leaves_out_when_the_machine_was_slow() -> None:
    values = [1.8] * 300 + [1.0, 9.0] * 100 + [1.0] * 100 + [1.8] * 200
    assert quiet_median(values) == 1.0
    assert quiet_median([1.8] * 400) == 1.8
    with pytest.raises(ValueError, match="40 blocks"):
        quiet_median([1.0] * 39)


def test_quantile_of_nothing_and_outside_of_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match="lies in"):
        quantile([1.0], 1.5)


def test_median_ratio_pairs_rounds_so_that_a_slow_round_cancels_out() -> None:
    assert median_ratio([20, 2, 22], [10, 1, 11]) == 2
    with pytest.raises(ValueError, match="one to one"):
        median_ratio([1, 2], [1])


@pytest.mark.parametrize("period", [1, 2, 7, 16])
def test_a_tail_with_a_period_of_at_most_16_loops(period: int) -> None:
    assert is_looping([*range(500, 530), *(i % period for i in range(64))])


def test_a_period_of_17_and_a_short_or_broken_tail_do_not_loop() -> None:
    assert not is_looping([i % 17 for i in range(128)])
    assert not is_looping([7] * 63)
    assert not is_looping([*[7] * 100, 8])
    assert not is_looping([*[7] * 32, 8, *[7] * 31])


def test_first_difference_finds_the_token_or_the_shorter_end() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_share_of_none_is_zero() -> None:
    assert share([]) == 0
    assert share([True, False, True, True]) == 0.75


def test_identical_needs_tokens_and_text_to_be_equal() -> None:
    plain = Series(Arm("plain"), [Round([completion([1, 2], "ab"), completion([3], "c")], 1.0)])
    ours = Series(Arm("double"), [Round([completion([1, 2], "ab"), completion([3], "d")], 0.5)])
    assert ours.identical(plain) == [True, False]
    assert ours.speedup(plain) == 2


def test_divergences_name_the_first_difference_and_the_common_text() -> None:
    requests = [Request("a", "x", 3), Request("b", "y", 3), Request("c", "z", 3)]
    plain = [completion([1, 2, 3]), completion([4, 5, 6]), completion([7, 8])]
    ours = [completion([1, 2, 3]), completion([4, 9, 6]), completion([7, 8], finish_reason="stop")]
    found = divergences(requests, plain, ours)
    assert [(one["id"], one["position"], one["plain"], one["double"]) for one in found] == [
        ("b", 1, [5], [9]),
        ("c", 2, [], []),
    ]
    assert found[0]["common"] == [4]


def test_rows_of_a_file_have_one_header_and_the_same_columns(tmp_path: Path) -> None:
    path = tmp_path / "results" / "bench.csv"
    rows.append(path, {"arm": "plain", "rate": 1 / 3, "identical": None})
    rows.append(path, {"arm": "double, full", "rate": 2.0, "identical": 1.0})
    with path.open(newline="") as file:
        found = list(csv.reader(file))
    assert found == [["arm", "rate", "identical"], ["plain", "0.333333", ""], ["double, full", "2", "1"]]
    assert rows.read(path)[1]["arm"] == "double, full"


def test_a_row_with_other_columns_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    rows.append(path, {"a": 1, "b": 2})
    before = path.read_text()
    with pytest.raises(ValueError, match="other columns"):
        rows.append(path, {"a": 1, "c": 2})
    with pytest.raises(ValueError, match="another order"):
        rows.append(path, {"b": 1, "a": 2})
    assert path.read_text() == before


def test_earlier_rows_are_kept_when_a_file_gains_a_column(tmp_path: Path) -> None:
    path = tmp_path / "bench.csv"
    rows.append(path, {"arm": "plain, alone", "batch": 1})
    rows.append(path, {"arm": "double", "workload": "edit", "batch": 4})
    assert rows.read(path) == [
        {"arm": "plain, alone", "workload": "", "batch": "1"},
        {"arm": "double", "workload": "edit", "batch": "4"},
    ]
    with pytest.raises(ValueError, match="other columns"):
        rows.append(path, {"arm": "double", "batch": 1})
    assert [entry.name for entry in tmp_path.iterdir()] == ["bench.csv"]


def test_provenance_holds_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--target", "/home/someone/target", "--batch", "1"])
    assert rows.provenance("benchmarks.run")["command"] == "python -m benchmarks.run --target target --batch 1"
    assert portable({"model": "/home/someone/draft", "num_speculative_tokens": 3}) == {
        "model": "draft",
        "num_speculative_tokens": 3,
    }


PAGE = """# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0"} %d
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0"} %d
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0"} %d
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0"} %d
"""


def test_tokens_per_forward_counts_forwards_without_drafts() -> None:
    # 100 tokens, of which 60 were accepted drafts: 40 forwards, though only 30 carried a draft.
    series = Series(Arm("ngram"))
    # Two starts of a server: its counters begin anew.
    series.read(counters(PAGE % (100, 10, 40, 20)), counters(PAGE % (150, 30, 100, 50)))
    series.read({}, counters(PAGE % (50, 10, 60, 30)))
    found = series.speculation
    assert found.tokens_per_forward == pytest.approx(100 / 40)
    assert found.acceptance == pytest.approx(60 / 120)
    assert found.chain_length == pytest.approx(120 / 30)
    assert found.hit_rate is None


def test_a_plain_server_commits_one_token_a_forward() -> None:
    page = '# TYPE vllm:generation_tokens_total counter\nvllm:generation_tokens_total{engine="0"} 50\n'
    found = speculation(counters(page))
    assert found.tokens_per_forward == 1
    assert found.acceptance is None


WAITS = """# TYPE vllm:double_target_forwards_total counter
vllm:double_target_forwards_total{engine="0"} 40
# TYPE vllm:double_waits_total counter
vllm:double_waits_total{engine="0"} 10
# TYPE vllm:double_wait_seconds_total counter
vllm:double_wait_seconds_total{engine="0"} 0.05
# TYPE vllm:double_waits_missed_total counter
vllm:double_waits_missed_total{engine="0"} 3
"""


def test_waits_are_counted_by_round_and_their_length_by_wait() -> None:
    found = speculation(counters(WAITS))
    assert found.waits_per_round == pytest.approx(0.25)
    assert found.wait_ms == pytest.approx(5)
    assert found.missed_share == pytest.approx(0.3)
    without = speculation(counters(PAGE % (100, 10, 40, 20)))
    assert (without.waits_per_round, without.wait_ms, without.missed_share) == (None, None, None)


def test_every_baseline_gets_each_thread_split_of_the_same_cores() -> None:
    assert [arm.label for arm in variants("plain", CHOICES)] == ["plain threads 0,1", "plain threads 0"]
    labels = [arm.label for arm in variants("ngram", CHOICES)]
    assert len(labels) == len(set(labels)) == 4
    (double,) = variants("double", CHOICES)
    assert [arm.threads for arm in variants("double-switched-off", CHOICES)] == ["0,1", "0"]
    assert double.threads is None
    assert double.speculative is not None
    assert double.speculative["method"] == "double"
    with pytest.raises(ValueError, match="no arm"):
        variants("doubel", CHOICES)


def test_draws_of_a_draft_model_are_an_arm_of_their_own_and_tried_where_texts_are_sampled() -> None:
    (drawn, *_), (greedy, *_) = (variants(name, CHOICES) for name in ("draft_model-probabilistic", "draft_model"))
    assert greedy.speculative is not None
    assert drawn.speculative == greedy.speculative | {"draft_sample_method": "probabilistic"}
    assert arguments(["--temperature", "0", "--batch", "1"]).arms == default_arms()
    assert "draft_model-probabilistic" not in default_arms()
    assert arguments(["--temperature", "0", "1"]).arms == default_arms(sampled=True)
    assert "draft_model-probabilistic" in default_arms(sampled=True)


def test_each_request_has_a_seed_of_its_own_only_if_one_is_given() -> None:
    options = arguments(["--num-prompts", "4", "--top-p", "0.9", "--top-k", "20", "--seed", "7"])
    asked = ask_for(options, Cell(1.0, options.top_p, 4))
    assert [request.seed for request in asked] == [7, 8, 9, 10]
    assert {(request.temperature, request.top_p, request.top_k) for request in asked} == {(1.0, 0.9, 20)}
    asked = ask_for(arguments(["--num-prompts", "4"]), Cell(1.0, None, 4))
    assert {(request.seed, request.top_p, request.top_k) for request in asked} == {(None, None, None)}


def measured(name: str, seconds: float) -> Series:
    return Series(Arm(name), [Round([completion([1, 2], "ab")], seconds)])


def test_the_best_other_method_may_be_the_one_that_draws_its_drafts() -> None:
    options = arguments(["--num-prompts", "4", "--top-p", "0.9", "--seed", "7"])
    arms = {"plain": 4.0, "ngram": 3.0, "draft_model": 2.0, "draft_model-probabilistic": 1.0, "double": 0.5}
    found = cell_rows(options, Cell(1.0, 0.9, 4), 66, [measured(*arm) for arm in arms.items()])
    by_arm = {row["arm"]: row for row in found}
    assert by_arm["double"]["against_best_other"] == pytest.approx(2)
    assert by_arm["draft_model-probabilistic"]["against_best_other"] == pytest.approx(2)
    assert {(row["temperature"], row["top_p"], row["top_k"], row["seed"]) for row in found} == {(1.0, 0.9, None, 7)}
    assert by_arm["double"]["identical"] == 1.0
    (unseeded, *_) = cell_rows(arguments([]), Cell(1.0, None, 4), 66, [measured("plain", 1.0)])
    assert unseeded["identical"] is None


def test_columns_for_waits_and_sampling_fit_into_the_rows_that_are_there() -> None:
    (row, *_) = cell_rows(arguments([]), Cell(0.0, None, 1), 66, [measured("plain", 1.0)])
    columns = [*row, "idle_cores", *rows.provenance("benchmarks.run")]
    with (rows.RESULTS / "bench.csv").open(newline="") as file:
        header = next(csv.reader(file))
    assert [column for column in columns if column in header] == header


def test_all_arms_get_the_same_environment_but_for_the_threads() -> None:
    target, cores = Path("/models/target"), (0, 1)
    plain = ServerConfig(target, cores, threads="0,1").variables()
    ours = ServerConfig(target, cores, speculative={"method": "double"}).variables()
    assert plain.pop("VLLM_CPU_OMP_THREADS_BIND", "0,1") == "0,1"
    assert plain == ours


def test_cost_line_gives_the_layers_of_a_cost_ratio() -> None:
    line = fit([6, 36, 66], [5, 17, 29])
    assert line == pytest.approx((2.6, 0.4))
    assert layers_for(16, 2.0, line) == round((32 - 2.6) / 0.4)
    assert layers_for(0.1, 2.0, line) == 1
    with pytest.raises(ValueError, match="two different"):
        fit([6, 6], [1, 2])


def test_prompts_are_mixed_as_the_file_is_and_too_few_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    entries = [{"id": f"a{i}", "kind": "a", "prompt": "x"} for i in range(8)]
    entries += [{"id": f"b{i}", "kind": "b", "prompt": "x"} for i in range(4)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert [prompt.kind for prompt in load_prompts(path, 6)] == ["a", "b", "a", "a", "b", "a"]
    assert len({prompt.id for prompt in load_prompts(path, 12)}) == 12
    assert [prompt.id for prompt in load_prompts(path, 2, ["b"])] == ["b0", "b1"]
    with pytest.raises(ValueError, match="has 12 such prompts"):
        load_prompts(path, 13)


def test_plots_take_the_latest_row_of_an_arm() -> None:
    row = {"temperature": "0", "batch": "1", "arm": "double", "layers": "66"}
    found = latest([row | {"speedup": "1"}, row | {"speedup": "2"}, row | {"batch": "4", "speedup": "3"}])
    assert found[(USUAL, "0", "1")]["double"]["66"]["speedup"] == "2"
    assert set(found) == {(USUAL, "0", "1"), (USUAL, "0", "4")}
    found = latest([row, row | {"temperature": "1", "top_p": "0.9", "top_k": "20"}])
    assert set(found) == {(USUAL, "0", "1"), (USUAL, "1-p0.9-k20", "1")}
    found = latest([row | {"workload": "", "speedup": "1"}, row | {"workload": "scripted-edit", "speedup": "2"}])
    assert set(found) == {(USUAL, "0", "1"), ("scripted-edit", "0", "1")}


@pytest.mark.parametrize(("text", "wanted"), [("0", [0]), ("0-2,5", [0, 1, 2, 5]), ("1,0", [0, 1])])
def test_core_lists_are_parsed(text: str, wanted: list[int]) -> None:
    assert parse_cores(text) == wanted


def test_a_process_that_left_the_session_and_lost_its_parent_is_still_found() -> None:
    # The leader starts a sleeper in a session of its own, and ends: only the mark tells whose it is.
    orphan = (
        "from subprocess import DEVNULL, Popen\n"
        "print(Popen(['sleep', '60'], start_new_session=True, stdout=DEVNULL, stderr=DEVNULL).pid)"
    )
    run = subprocess.run(
        [sys.executable, "-c", orphan],
        env=os.environ | {MARK: "t"},
        capture_output=True,
        text=True,
        check=True,
    )
    sleeper = psutil.Process(int(run.stdout))
    try:
        assert sleeper in family(os.getpid() + 1_000_000_000, "t", set())
        assert sleeper in family(os.getpid() + 1_000_000_000, "other", {sleeper})
    finally:
        sleeper.kill()
        end = time.monotonic() + 10
        while family(os.getpid() + 1_000_000_000, "t", {sleeper}):
            assert time.monotonic() < end, "a killed process is still counted as living"


class Scripted(ServerConfig):
    """A server that is a Python script; {port} is replaced."""

    script = ""

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-c", self.script.replace("{port}", str(port))]


class Stubborn(Scripted):
    """Healthy, deaf to SIGTERM, with a child in a session of its own."""

    script = """
import http.server, signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "60"], start_new_session=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"vllm:x_total 1")

    def log_message(self, *arguments):
        pass

http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


class Broken(Scripted):
    """Says why and ends."""

    script = "import sys; sys.exit('no such model')"


def test_stopping_a_deaf_server_leaves_neither_it_nor_its_child(tmp_path: Path) -> None:
    config = Stubborn(tmp_path, tuple(os.sched_getaffinity(0)))
    with Server("stubborn", config, tmp_path) as server:
        server.wait_healthy(60)
        processes = server.processes()
        assert {process.name() for process in processes} >= {"sleep"}
        assert len(processes) == 2
        server.stop(grace_s=0.2)
        assert server.processes() == set()


def test_a_server_that_ends_at_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    config = Broken(tmp_path, tuple(os.sched_getaffinity(0)))
    with Server("broken", config, tmp_path) as server, pytest.raises(ServerError, match="no such model"):
        server.wait_healthy(60)


def test_sigterm_ends_a_benchmark_like_an_exception() -> None:
    script = (
        "import os, signal\n"
        "from benchmarks.server import exit_on_sigterm\n"
        "exit_on_sigterm()\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    signal.pause()\n"
        "finally:\n"
        "    print('servers ended', flush=True)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stdout) == (143, "servers ended\n")


def test_reliability_is_that_of_the_latest_run_where_there_were_trials_enough() -> None:
    def row(source: str, sampled: str, said: str, right: str, trials: str, time: str) -> dict[str, str]:
        return {"source": source, "sampled": sampled, "said": said, "right": right, "trials": trials, "time": time}

    table = [
        row("draft", "False", "0.5", "0.1", "900", "older"),
        row("draft", "False", "0.5", "0.6", "900", "newer"),
        row("draft", "False", "0.95", "0.9", "19", "newer"),
        row("context", "True", "0", "0.2", "20", "newer"),
    ]
    assert reliability(table) == {"greedy": {"draft": [(0.525, 0.6)]}, "sampled": {"context": [(0.025, 0.2)]}}


def test_rows_of_several_runs_or_of_few_batches_are_one_line_over_batches() -> None:
    def row(arm: str, batch: int, command: str, speedup: str, commit: str = "a") -> dict[str, str]:
        return {
            "arm": arm, "batch": str(batch), "temperature": "0", "layers": "32", "command": command, "commit": commit,
            "speedup": speedup,
        }  # fmt: skip

    sweep = [row(arm, batch, "one", f"{batch}.5", "a+") for batch in (1, 2, 4) for arm in ("plain", "double")]
    few = [row(arm, batch, "other", "9") for batch in (1, 8) for arm in ("plain", "double")]
    (lines,) = over_batch([row("plain", 1, "one", "0", "older"), *sweep, *few]).values()
    assert {arm: {batch: r["speedup"] for batch, r in found.items()} for arm, found in lines.items()} == {
        arm: {1.0: "1.5", 2.0: "2.5", 4.0: "4.5"} for arm in ("plain", "double")
    }
