"""The fit to measured rows, in a world whose answers are formulas."""

import json
from pathlib import Path

import pytest

from benchmarks import plan_fit, rows
from benchmarks.plan_fit import Fit, acceptance_of, fit, groups, solve
from vllm_double.planning.script import Script, Times
from vllm_double.planning.world import Outcome

TRUE = Fit(Script(0.62, tail=0.5, copied=0.25), 0.03, 1.3, (4.5, 5.25), 400)


def simulate(script: Script, times: Times, *, num_tokens: int, num_speculative_tokens: int) -> Outcome:
    """Rises with what it rises with in the real simulation."""
    hit_rate = 1 - (1 - script.acceptance) * (1 - script.copied) * 16**-script.tail
    tokens = 1 + hit_rate * (script.acceptance / (1 - script.acceptance) + 3 * script.copied)
    step = times.target + times.token * tokens + times.gap
    return Outcome(times.target * tokens / step, tokens, hit_rate, tokens, 100, 100, 0.0)


@pytest.fixture(autouse=True)
def formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_fit, "simulate", simulate)


def measured(layers: int, cost_ratio: float, arms: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows as the benchmark would write them in a world of `TRUE`."""
    step_ms = 5.0 * cost_ratio
    found = []
    for arm in arms:
        row = {
            "arm": arm, "layers": str(layers), "batch": "1", "temperature": "0", "cost_ratio": f"{cost_ratio:g}",
            "target_step_ms": f"{step_ms:g}", "draft_step_ms": "5", "tokens": "512", "prompts": "4",
            "config": json.dumps({"num_speculative_tokens": 3 if arm == "draft_model" else 16}),
            "first_token_s_p50": f"{1e-3 * step_ms * TRUE.prefill[arm != 'plain']:g}",
            "tokens_per_forward": "1", "hit_rate": "", "speedup": "1",
        }  # fmt: skip
        if arm == "draft_model":
            row["tokens_per_forward"] = str(sum(TRUE.script.acceptance**power for power in range(4)))
        elif arm != "plain":
            outcome = TRUE.simulate(row)
            row |= {"tokens_per_forward": str(outcome.tokens_per_forward), "hit_rate": str(outcome.hit_rate)}
            row["speedup"] = str(TRUE.speedup(row))
        found.append(row)
    return found


@pytest.mark.parametrize("source", ["double-without-retrieval", "draft_model"])
def test_the_fit_finds_the_script_that_made_the_rows(source: str) -> None:
    [group] = groups(measured(32, 8.0, ("plain", source, "double")))
    found = fit(group, token_cost=0.03, num_tokens=400, passes=4)
    assert found.script.acceptance == pytest.approx(0.62, abs=0.01)
    assert found.script.tail == pytest.approx(0.5, abs=0.03)
    assert found.script.copied == pytest.approx(0.25, abs=0.02)
    assert found.gap == pytest.approx(1.3, abs=0.1)
    assert found.prefill == pytest.approx((4.5, 5.25))
    for cost_ratio in (4.0, 16.0, 32.0):
        row = measured(60, cost_ratio, ("double",))[0]
        assert found.speedup(row) == pytest.approx(float(row["speedup"]), rel=0.02)


def test_a_group_without_acceptance_is_refused() -> None:
    with pytest.raises(ValueError, match="the acceptance follows from"):
        fit(groups(measured(32, 8.0, ("plain", "double")))[0])


def test_rows_of_another_kind_are_left_out() -> None:
    table = measured(32, 8.0, ("plain", "double"))
    others = [
        row | change
        for row in table
        for change in ({"batch": "4"}, {"temperature": "1"}, {"cost_ratio": ""}, {"workload": "edit"})
    ]
    alone = measured(44, 11.0, ("plain", "ngram"))
    assert groups([*others, *alone, *table]) == [{"plain": table[0], "double": table[1]}]


def test_the_acceptance_gives_the_tokens() -> None:
    for acceptance in (0.1, 0.583, 0.9):
        tokens = (1 - acceptance**4) / (1 - acceptance)
        assert acceptance_of(tokens, 3) == pytest.approx(acceptance, abs=0.02)


def test_a_solution_stays_within_its_range() -> None:
    assert solve(lambda x: x, 3.0, 0.0, 1.0) == 1.0
    assert solve(lambda x: x, -3.0, 0.0, 1.0) == 0.0
    assert solve(lambda x: x**9, 0.5, 0.0, 1.0) == pytest.approx(0.5 ** (1 / 9), rel=0.01)


def test_predictions_are_printed_beside_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for cost_ratio in (16.0, 8.0):
        for row in measured(int(4 * cost_ratio), cost_ratio, ("plain", "double-without-retrieval", "double")):
            rows.append(tmp_path / "rows.csv", row)
    plan_fit.main(["--input", str(tmp_path / "rows.csv"), "--at", "9"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fitted at C = 8.0, 32 layers:"
    assert lines[1].startswith("vllm-double plan --cost-ratio 4,8,16,32 --acceptance 0.6")
    assert [line.split()[:3] for line in lines[3:]] == [
        [layers, ratio, arm]
        for layers, ratio in (("32", "8.0"), ("64", "16.0"))
        for arm in ("double-without-retrieval", "double")
    ]
    assert all(abs(int(line.split()[5].rstrip("%"))) <= 2 for line in lines[3:])
