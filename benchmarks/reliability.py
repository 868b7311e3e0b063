"""How far each source of drafts can be believed: python -m benchmarks.reliability

A double server answers prompts, greedily and sampled; then its table of calibration is read, as `vllm-double switch status
--calibration` shows it. A row of results/reliability.csv for each source, kind and bucket of what the source said:
how often it was right, of how many trials. `make plots` draws the latest run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import rows, workload
from benchmarks.arms import Choices, variants
from benchmarks.harness import Fleet
from benchmarks.machine import cores, parse_cores
from benchmarks.server import ServerConfig, exit_on_sigterm
from vllm_double.operations.switch import find_servers, select

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Files the rows, and prints how many."""
    exit_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--cores", type=parse_cores, default=cores())
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "reliability.csv")
    parser.add_argument("--logs", type=Path, default=workload.PAIR.parent / "logs")
    options = parser.parse_args(argv)
    prompts = workload.load_prompts(workload.PROMPTS, options.num_prompts)
    [arm] = variants("double", Choices(workload.DRAFT, tuple(options.cores)))
    with tempfile.TemporaryDirectory(prefix="vllm-double-reliability-") as folder:
        target = workload.inflated(workload.TARGET, options.layers, Path(folder))
        with Fleet([arm], ServerConfig(target, tuple(options.cores)), options.logs) as fleet:
            for temperature in options.temperature:
                fleet.ask(arm, workload.requests(prompts, options.max_tokens, temperature), options.batch)
            [server] = select(find_servers()[0], fleet.server(arm).pid, None)
            table = server.engines[0]["calibration"]
    provenance = rows.provenance("benchmarks.reliability")  # of one time, by which the rows are known as one run's
    for source, temperatures, said, right, trials in table:
        row: dict[str, rows.Value] = {"source": source, "sampled": temperatures > 0}
        row |= {"said": said, "right": right, "trials": trials}
        rows.append(options.output, row | provenance)
    print(f"{len(table)} rows in {options.output.name}")


if __name__ == "__main__":
    main()
