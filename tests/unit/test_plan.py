"""The published methods against their closed forms, and this loop, cut down to each, against a slow twin of it."""

import itertools
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest

from tests.fakes.target import FreeVerification
from vllm_double.cli import main
from vllm_double.planning.command import curves
from vllm_double.planning.predict import METHODS, Deployment, predict
from vllm_double.planning.published import double, fan_outs, pearl, saguaro, speculative
from vllm_double.planning.script import Script, Tables, Times, texts
from vllm_double.planning.world import Outcome, simulate

EVERYTHING = 1e-120  # a path probability that no path in these tests falls below
NO_SPREAD = 1e6  # the draft is equally sure everywhere, so that a round's tokens depend on the acceptance alone


def rounds_of_pearl(tables: Tables, prompt: int, num_tokens: int, draft_length: int) -> int:
    """PEARL (2408.11850), slow and obvious: the target's text and what the draft says, token by token."""

    def draft(token: int) -> int:
        return int(tables.children(np.array([token], np.uint64), 1)[0][0, 0])

    text, num_rounds = [prompt], 0
    to_verify: list[int] = []  # drafted tokens, of which the first was verified by the round that they were made in
    while len(text) < num_tokens:
        num_rounds += 1
        drafted = [text[-1], *to_verify]
        for _ in range(draft_length):
            drafted.append(draft(drafted[-1]))
        new = drafted[-draft_length:]
        for token in to_verify:
            text.append(tables.target(text[-1]))
            if text[-1] != token:
                to_verify = []
                break
        else:
            text.append(tables.target(text[-1]))
            to_verify = new[1:] if text[-1] == new[0] else []
    return num_rounds


def rounds_of_saguaro(tables: Tables, prompt: int, num_tokens: int, draft_length: int, fan_out: int) -> tuple[int, int]:
    """Rounds and misses of Saguaro (2603.03251) with a uniform fan-out and a backup that drafts nothing after a miss. Prepared
    are, behind each number of accepted tokens, the draft's ``fan_out`` best tokens, the chain's own among them."""

    def best(token: int) -> list[int]:
        return tables.children(np.array([token], np.uint64), fan_out)[0][0].tolist()

    def greedy(token: int) -> list[int]:
        path = [token]
        while len(path) <= draft_length:
            path.append(best(path[-1])[0])
        return path[1:]

    text, chain, num_rounds, num_misses = [prompt], list[int](), 0, 0
    while len(text) < num_tokens:
        num_rounds += 1
        outcomes = {
            (number, token): greedy(token)
            for number, last in enumerate([text[-1], *chain])
            for token in best(last)
        }  # fmt: skip
        num_accepted = 0
        for token in chain:
            if tables.target(text[-1]) != token:
                break
            text.append(token)
            num_accepted += 1
        text.append(tables.target(text[-1]))
        prepared = outcomes.get((num_accepted, text[-1]))
        num_misses += prepared is None
        chain = prepared or []
    return num_rounds, num_misses


def loop(script: Script, cost_ratio: float, num_tokens: int, **settings: object) -> Outcome:
    return simulate(script, Times(1e-3 * cost_ratio, 1e-3), num_tokens=num_tokens, may_wait=False, **settings)  # type: ignore[arg-type]


SCRIPTS = [Script(0.65), Script(0.65, seed=1), Script(0.9, tail=1.0), Script(0.4, spread=5.0), Script(1.0), Script(0.8, seed=7)]


def misses(script: Script, num_tokens: int, fan_out: list[int], batch: int = 1) -> tuple[int, int]:
    """Rounds of `saguaro`, and how many began with drafts made just in time, read off the time that they took."""
    scripted = texts(Tables(script), batch, num_tokens + 256)
    play = saguaro(scripted, Times(1.0, 1e-6), num_tokens, fan_out)
    return play.rounds, round((play.seconds - play.rounds) / (1e-6 * (len(fan_out) - 1)))


# ---- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_length", [1, 3, 8])
@pytest.mark.parametrize("acceptance", [0.4, 0.65, 0.9])
def test_tokens_of_a_round_are_those_of_the_closed_form(acceptance: float, draft_length: int) -> None:
    """Leviathan et al., 2211.17192, equation 1."""
    scripted = texts(Tables(Script(acceptance, spread=NO_SPREAD)), 1, 20_256)
    play = speculative(scripted, Times(10.0, 1.0), 20_000, draft_length)
    tokens_per_round = (1 - acceptance ** (draft_length + 1)) / (1 - acceptance)
    assert 19_999 / play.rounds == pytest.approx(tokens_per_round, rel=0.03)
    assert play.seconds == pytest.approx(play.rounds * (10.0 + draft_length))


@pytest.mark.parametrize("cost_ratio", [2, 4, 8, 16])
def test_pearl_is_at_most_as_fast_as_its_cap(cost_ratio: int) -> None:
    times = Times(float(cost_ratio), 1.0)
    for acceptance in (0.6, 0.9, 1.0):
        scripted = texts(Tables(Script(acceptance)), 1, 2256)
        speedups = [pearl(scripted, times, 2000, length).speedup(times, 1, 2000) for length in range(1, 2 * cost_ratio)]
        assert max(speedups) <= cost_ratio
    assert speedups[cost_ratio - 1] == pytest.approx(cost_ratio, rel=0.01)


@pytest.mark.parametrize("cost_ratio", [2, 4, 8])
@pytest.mark.parametrize("copied", [0.0, 0.3, 0.8])
def test_double_keeps_to_its_cap(cost_ratio: int, copied: float) -> None:
    """C (1 + AMT), 2601.05524: the draft is always right, so that a step gives all that it makes."""
    times = Times(float(cost_ratio), 1.0)
    [text] = texts(Tables(Script(1.0, copied=copied)), 1, 6000)
    found = double([text], times, 5000, cost_ratio)
    place, num_forwards = 1, 0
    while place < 5000:
        place += min(text.copied[place], 10) + 1
        num_forwards += 1
    mean_matched = (place - 1) / num_forwards - 1
    assert found.matched / found.draft_forwards == pytest.approx(mean_matched, rel=0.05, abs=0.01)
    assert found.speedup(times, 1, 5000) == pytest.approx(cost_ratio * (1 + mean_matched), rel=0.02)
    assert copied == 0 or mean_matched > 0.25
    # Rejections only take away from it.
    assert double(texts(Tables(Script(0.7, copied=copied)), 1, 6000), times, 5000, cost_ratio).rounds > 1.3 * found.rounds


@pytest.mark.parametrize("acceptance", [0.6, 0.9])
def test_double_without_retrieval_is_pearl(acceptance: float) -> None:
    scripted, times = texts(Tables(Script(acceptance)), 3, 1256), Times(6.0, 1.0, token=0.1, draft_token=0.05, gap=0.5)
    for length in (1, 3, 6):
        assert double(scripted, times, 1000, length) == replace(pearl(scripted, times, 1000, length), draft_forwards=ANY)


@pytest.mark.parametrize(("draft_length", "fan_out"), [(4, 1), (4, 3), (2, 8)])
def test_saguaro_misses_as_often_as_the_power_law_says(draft_length: int, fan_out: int) -> None:
    script = Script(0.675, tail=0.6, spread=NO_SPREAD)
    a, tail = script.acceptance, script.tail
    rejected = (1 - a**draft_length) * (fan_out + 1) ** -tail
    accepted = a**draft_length * (1 - a) * fan_out**-tail
    num_rounds, num_misses = misses(script, 20_000, [fan_out] * (draft_length + 1))
    assert 20_000 / num_rounds == pytest.approx((1 - a ** (draft_length + 1)) / (1 - a), rel=0.03)
    assert num_misses / num_rounds == pytest.approx(rejected + accepted, rel=0.05)
    # One miss sends a whole batch to drafts made just in time.
    num_rounds, num_misses = misses(script, 4000, [fan_out] * (draft_length + 1), batch=4)
    assert num_misses / num_rounds == pytest.approx(1 - (1 - rejected - accepted) ** 4, rel=0.05)


@pytest.mark.parametrize(("acceptance", "tail"), [(0.65, 0.3), (0.8, 1.0)])
def test_no_fan_out_misses_less_than_the_geometric_one(acceptance: float, tail: float) -> None:
    chances = [(1 - acceptance), acceptance * (1 - acceptance), acceptance**2]

    def miss_rate(fan_out: Iterable[int]) -> float:
        return sum(chance * count**-tail for chance, count in zip(chances, fan_out, strict=True))

    found = fan_outs(acceptance, tail, 2, 20)
    every = [fan for fan in itertools.product(range(1, 20), repeat=3) if sum(fan) == sum(found)]
    assert abs(sum(found) - 20) <= 1
    assert miss_rate(found) <= 1.001 * min(map(miss_rate, every))


def test_a_draft_that_is_always_right_prepares_for_acceptance_alone() -> None:
    assert fan_outs(1.0, 0.3, 3, 8) == [1, 1, 1, 8]


# ---- this loop, cut down to a published one ------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_length", [2, 4, 9])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: f"a{script.acceptance:g}-seed{script.seed}")
def test_the_loop_on_one_path_takes_the_rounds_of_pearl(script: Script, draft_length: int) -> None:
    """One node an iteration, one child a node. A step gives time for PEARL's draft and for the forward that a miss finds under
    way; then the draft waits for the commit, as PEARL's does, because it may go no deeper."""
    expected = rounds_of_pearl(Tables(script), 7919, 150, draft_length)
    found = loop(
        script, draft_length + 1.5, 150, num_speculative_tokens=draft_length - 1, nodes_per_iteration=1, children_per_node=1,
        min_path_prob=EVERYTHING, step_cost=FreeVerification(),
    )  # fmt: skip
    assert found.rounds == expected
    assert pearl(texts(Tables(script), 1, 406), Times(1.0, 1.0), 150, draft_length).rounds == expected


def test_each_request_of_a_batch_takes_the_rounds_of_pearl() -> None:
    """Of a batch, each request is PEARL where the step gives time for the drafts of all."""
    script = Script(0.7, seed=5)
    expected = [rounds_of_pearl(Tables(script), 7919 * (index + 1), 200, 4) for index in range(3)]
    found = loop(
        script, 3 * 4 + 1.5, 200, batch=3, num_speculative_tokens=3, nodes_per_iteration=1, children_per_node=1,
        min_path_prob=EVERYTHING, step_cost=FreeVerification(),
    )  # fmt: skip
    assert (found.forwards, found.rounds) == (sum(expected), max(expected))
    play = pearl(texts(Tables(script), 3, 456), Times(1.0, 1.0), 200, 4)
    assert (play.forwards, play.rounds) == (sum(expected), max(expected))


@pytest.mark.parametrize(("draft_length", "fan_out"), [(2, 2), (3, 2), (2, 3), (1, 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loop_with_a_uniform_fan_out_takes_the_rounds_of_saguaro(draft_length: int, fan_out: int, seed: int) -> None:
    """All that the lists hold is drafted in time, so that a round hits exactly where the target's token behind the accepted
    ones is among the draft's ``fan_out`` best; what is kept of earlier rounds changes nothing then. What cannot be equal is the
    round after a miss: Saguaro makes a chain just in time, and this target never waits. Hence the twin's empty backup."""
    script = Script(0.675, tail=0.6, spread=NO_SPREAD, seed=seed)
    expected = rounds_of_saguaro(Tables(script), 7919, 100, draft_length, fan_out)
    found = loop(
        script, 20.0, 100, num_speculative_tokens=draft_length, nodes_per_iteration=4096, children_per_node=fan_out,
        min_path_prob=EVERYTHING, step_cost=FreeVerification(),
    )  # fmt: skip
    assert (found.rounds, round(found.rounds * (1 - found.hit_rate))) == expected


# ---- the command --------------------------------------------------------------------------------------------------------


def test_the_table_shows_the_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--acceptance", "0.65", "--retrieval-hit-rate", "0.2", "--tokens", "60"]
    assert main(["plan", "--cost-ratio", "4,8", "--batch", "1,2", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines[2:]}) == 1, "columns"
    header, *rows = [line.split() for line in lines[2:]]
    assert header[2:7] == list(METHODS)
    assert [(int(row[0]), float(row[1])) for row in rows] == [(1, 4.0), (1, 8.0), (2, 4.0), (2, 8.0)]
    script = Script(0.65, copied=0.2)
    found = predict(script, Deployment(8.0, 2, 0.03, 0.05, 1.0), 60)
    assert rows[3][2:7] == [f"{found.speedups[method]:.2f}" for method in METHODS]
    assert rows[3][7:] == [f"({found.draft_length})", f"{found.ours.tokens_per_forward:.2f}", f"{found.ours.hit_rate:.2f}"]
    assert curves([found]) == {2: {method: [(8.0, found.speedups[method])] for method in METHODS}}


def test_higher_costs_lower_every_speed_up() -> None:
    script = Script(0.65)
    base = predict(script, Deployment(8.0, 1, 0.0, 0.0, 0.0), 120)
    for other in (Deployment(8.0, 1, 0.1, 0.0, 0.0), Deployment(8.0, 1, 0.0, 0.5, 0.0), Deployment(8.0, 1, 0.0, 0.0, 3.0)):
        found = predict(script, other, 120)
        assert all(found.speedups[method] <= base.speedups[method] for method in METHODS)
        assert found.speedups["ours"] < 0.97 * base.speedups["ours"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cost-ratio", "4", "--acceptance", "x"], "--acceptance: 'x' is not a number"),
        (["--cost-ratio", "4", "--acceptance", "1.2"], "--acceptance: 1.2 is not from 0 to 1"),
        (["--cost-ratio", "4,", "--acceptance", "0.5"], "--cost-ratio: '' is not a number"),
        (["--cost-ratio", "nan", "--acceptance", "0.5"], "--cost-ratio: nan is not from 0.01 to 1000"),
        (["--cost-ratio", "4", "--acceptance", "0.5", "--batch", "1,2.5"], "--batch: 2.5 is not a whole number"),
        (["--cost-ratio", "4", "--acceptance", "0.5", "--gap", "-1"], "--gap: -1 is not a number from 0 on"),
        (["--acceptance", "0.5"], "required: --cost-ratio"),
    ],
)
def test_a_wrong_argument_is_answered_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *arguments])
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--acceptance", "0"], "acceptance is 0, not in (0, 1]"),
        (["--acceptance", "0.5", "--retrieval-hit-rate", "0.99"], "the copied share is 0.99, not from 0 to 0.923"),
        (["--acceptance", "0.5", "--plot", "plot.png"], "--plot needs matplotlib, which is not installed"),
    ],
)
def test_an_impossible_prediction_or_plot_is_answered_with_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert main(["plan", "--cost-ratio", "4", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_the_command_loads_no_model_runtime() -> None:
    code = "import sys, vllm_double.planning.command; print({'torch', 'vllm', 'ray', 'matplotlib'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_a_plot_is_drawn_in_a_known_format_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ["plan", "--cost-ratio", "2,4", "--acceptance", "0.6", "--tokens", "40", "--plot"]
    assert main([*options, str(tmp_path / "plan.svg")]) == 0
    drawn = (tmp_path / "plan.svg").read_text()
    assert "<svg" in drawn
    capsys.readouterr()
    assert main([*options, str(tmp_path / "no" / "plan.svg")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
    assert main([*options, str(tmp_path / "plan.xyz")]) == 2
    assert "does not end in a format" in capsys.readouterr().err
