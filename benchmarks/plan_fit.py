"""Fits the script of `vllm-double plan` to rows of one cost ratio, and predicts the speed-ups of rows at all others.

    python -m benchmarks.plan_fit --at 8 --since 2026-11-27T14 --token-cost 0.02

Greedy rows of one workload at batch 1 count, of the arms double, double-without-retrieval and draft_model. What is fitted,
until the simulation gives what was measured: acceptance and tail (tokens per forward and hit rate without retrieval; where no
such row is there, draft_model's tokens per forward give the acceptance, by its closed form), the copied share (tokens per
forward with retrieval) and the gap between two steps (speed-up). What a verified token costs is an option: no row holds it.
Prompts are read in as many target steps as in the fitted rows. This is no part of the package, because it reads the
benchmark's columns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import rows
from benchmarks.plots import USUAL
from vllm_double.planning.predict import Deployment
from vllm_double.planning.script import Script
from vllm_double.planning.world import Outcome, simulate

__all__ = ["Fit", "acceptance_of", "fit", "groups", "main", "solve"]

PLAIN, FULL, WITHOUT_RETRIEVAL, DRAFT_MODEL = "plain", "double", "double-without-retrieval", "draft_model"
Group = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Fit:
    """The script and what else was fitted. prefill: target steps until the first token, of plain decoding and of double."""

    script: Script
    token_cost: float
    gap: float
    prefill: tuple[float, float]
    num_tokens: int

    def simulate(self, row: Mapping[str, str]) -> Outcome:
        """The simulation of a row's arm at its cost ratio."""
        script = self.script if row["arm"] == FULL else replace(self.script, copied=0.0)
        times = Deployment(float(row["cost_ratio"]), 1, self.token_cost, 0.0, self.gap).times
        length = json.loads(row["config"])["num_speculative_tokens"]
        return simulate(script, times, num_tokens=self.num_tokens, num_speculative_tokens=length)

    def speedup(self, row: Mapping[str, str]) -> float:
        """Predicted tokens per second over plain decoding, from the request to the last token."""
        num_tokens = float(row["tokens"]) / float(row["prompts"]) - 1
        plain, double = self.prefill
        return (plain + num_tokens) / (double + num_tokens / self.simulate(row).speedup)


def groups(table: Sequence[Mapping[str, str]], workload: str = USUAL) -> list[Group]:
    """The measurements of double at batch 1 and T = 0, as {arm: row}, oldest first."""
    found: dict[tuple[str, ...], dict[str, Mapping[str, str]]] = {}
    for row in table:
        is_greedy = row["batch"] == "1" and float(row["temperature"]) == 0
        if is_greedy and row["cost_ratio"] and (row.get("workload") or USUAL) == workload:
            key = row["layers"], row["target_step_ms"], row["draft_step_ms"]
            found.setdefault(key, {})[row["arm"]] = row
    return [group for group in found.values() if PLAIN in group and FULL in group]


def acceptance_of(tokens_per_forward: float, draft_length: int) -> float:
    """The acceptance a with which plain speculative decoding gives 1 + a + .. + a^draft_length tokens per forward."""
    return solve(lambda a: sum(a**power for power in range(draft_length + 1)), tokens_per_forward, 0.0, 1.0)


def solve(function: Callable[[float], float], wanted: float, low: float, high: float, tolerance: float = 0.005) -> float:
    """Where a rising function is ``wanted``, to ``tolerance`` of that; the end of the range that is nearer if it is nowhere."""
    at_low, at_high = function(low) - wanted, function(high) - wanted
    if at_low >= 0 or at_high <= 0:
        return low if at_low >= 0 else high
    for number in range(20):
        # In turns, because chords alone approach a bent function from one side.
        middle = (low + high) / 2 if number % 2 else low - at_low * (high - low) / (at_high - at_low)
        found = function(middle) - wanted
        if abs(found) <= tolerance * wanted:
            return middle
        low, at_low, high, at_high = (middle, found, high, at_high) if found < 0 else (low, at_low, middle, found)
    return (low + high) / 2


def fit(group: Group, token_cost: float = 0.03, num_tokens: int = 1000, passes: int = 2) -> Fit:
    """What makes the simulation give the measured tokens per forward, hit rates and speed-up of double. ValueError where the
    group has no row that tells the acceptance."""
    plain, full = group[PLAIN], group[FULL]
    prefill = _steps_to_first_token(plain, plain), _steps_to_first_token(full, plain)
    if WITHOUT_RETRIEVAL in group:
        bare = group[WITHOUT_RETRIEVAL]
        acceptance = 0.6
    elif DRAFT_MODEL in group:
        bare = None
        row = group[DRAFT_MODEL]
        acceptance = acceptance_of(float(row["tokens_per_forward"]), json.loads(row["config"])["num_speculative_tokens"])
    else:
        raise ValueError("the acceptance follows from a row of double-without-retrieval or draft_model, and there is neither")
    found = Fit(Script(acceptance, copied=0.1), token_cost, 1.0, prefill, num_tokens)

    def fitted(name: str, row: Mapping[str, str], column: str, low: float, high: float) -> Fit:
        """With the parameter of the script that makes a column what it is in the row."""

        def with_value(value: float) -> Fit:
            return replace(found, script=replace(found.script, **{name: value}))

        return with_value(solve(lambda x: getattr(with_value(x).simulate(row), column), float(row[column]), low, high))

    for _ in range(passes):
        if bare is not None:
            found = fitted("acceptance", bare, "tokens_per_forward", 0.2, 0.95)
            found = fitted("tail", bare, "hit_rate", 0.05, 2.0)
            found = fitted("copied", full, "tokens_per_forward", 0.0, 0.8)
        else:
            found = fitted("copied", full, "tokens_per_forward", 0.0, 0.8)
            found = fitted("tail", full, "hit_rate", 0.05, 2.0)
        found = _with_gap(found, full)
    return found


def _steps_to_first_token(row: Mapping[str, str], plain: Mapping[str, str]) -> float:
    return 1000 * float(row["first_token_s_p50"]) / float(plain["target_step_ms"])


def _with_gap(found: Fit, row: Mapping[str, str]) -> Fit:
    """With the gap that makes up the time which the row's forwards took, in draft forwards; at least 0."""
    num_tokens, (plain, double) = float(row["tokens"]) / float(row["prompts"]) - 1, found.prefill
    measured = num_tokens / ((plain + num_tokens) / float(row["speedup"]) - double)  # without the prompt
    outcome = found.simulate(row)
    steps_of_a_round = outcome.tokens_per_forward * (1 / measured - 1 / outcome.speedup)  # in target steps, too few so far
    return replace(found, gap=max(0.0, found.gap + steps_of_a_round * float(row["cost_ratio"])))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what was fitted, and what is predicted beside what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=rows.RESULTS / "bench.csv")
    parser.add_argument("--at", type=float, default=8.0, help="cost ratio whose rows are fitted: the latest of the nearest")
    parser.add_argument("--workload", default=USUAL)
    parser.add_argument("--since", default="", help="only rows from this time on, as 2026-11-27T14: those of one machine, say")
    parser.add_argument("--token-cost", type=float, default=0.03, help="of a verified token, as a share of a target step")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of a simulation")
    options = parser.parse_args(argv)
    table = [row for row in rows.read(options.input) if row.get("time", "") >= options.since]
    measured = groups(table, options.workload)
    if not measured:
        parser.error(f"{options.input} has no such greedy rows of plain and double at batch 1 for {options.workload}")
    chosen = min(reversed(measured), key=lambda group: round(abs(float(group[FULL]["cost_ratio"]) - options.at)))
    found = fit(chosen, options.token_cost, options.tokens)
    script = found.script
    print(f"fitted at C = {float(chosen[FULL]['cost_ratio']):.1f}, {chosen[FULL]['layers']} layers:")
    print(
        f"vllm-double plan --cost-ratio 4,8,16,32 --acceptance {script.acceptance:.3f} --tail {script.tail:.3f} "
        f"--retrieval-hit-rate {script.copied:.3f} --token-cost {found.token_cost:g} --draft-token-cost 0 --gap {found.gap:.2f}"
    )
    print("layers     C  arm                       speed-up: measured  predicted  error    tokens/forward  hit rate")
    for group in sorted(measured, key=lambda group: float(group[FULL]["cost_ratio"])):
        for arm in (WITHOUT_RETRIEVAL, FULL):
            if arm not in group:
                continue
            row, speedup = group[arm], found.speedup(group[arm])
            outcome = found.simulate(row)
            error = speedup / float(row["speedup"]) - 1
            note = " (fitted)" if group is chosen else ""
            print(
                f"{row['layers']:>6}  {float(row['cost_ratio']):4.1f}  {arm:24}  "
                f"{float(row['speedup']):18.2f}  {speedup:9.2f}  "
                f"{error:+5.0%}  {float(row['tokens_per_forward']):.2f} / {outcome.tokens_per_forward:.2f}  "
                f"{float(row['hit_rate']):.2f} / {outcome.hit_rate:.2f}{note}",
                flush=True,
            )


if __name__ == "__main__":
    main()
