"""Engines on the bundled pair, and what is asked of them."""

import gc
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import REGISTRY

from tests.chaos.chaos import MARKER, Process, Run, all_processes

ROOT = Path(__file__).resolve().parents[2]
PAIR = ROOT / "benchmarks/pair"
DRAFT = PAIR / "draft"
MAX_LEN = 384
_RUN = Run(os.environ.setdefault(MARKER, secrets.token_hex(8)))
Texts = dict[str, list[list[int]]]


def prompts(count: int) -> list[str]:
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def descendants() -> list[Process]:
    """Of this process, with our hosts and guards, which have no parent; but for the one with which Python's multiprocessing
    follows segments for as long as this one runs."""
    pids = {child.pid for child in psutil.Process().children(recursive=True)} | {process.pid for process in _RUN.processes()}
    ours = [process for process in all_processes() if process.pid in pids - {os.getpid()}]
    return [process for process in ours if "resource_tracker" not in process.command]


def draft_actors() -> list[Process]:
    """Of engines of this process."""
    return [process for process in descendants() if process.role == "actor"]


@contextmanager
def engine(speculative: dict[str, Any] | None, bind: str = "auto", until: str = "worker_up", **arguments: Any) -> Iterator[Any]:
    """A fresh engine, with drafts ready where there is a draft model. bind: cores of its ranks. until: this metric is 1."""
    from vllm import LLM

    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bind
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": MAX_LEN, "max_num_seqs": 8} | arguments
    llm = LLM(str(PAIR / "target"), speculative_config=speculative, disable_log_stats=False, **settings)
    try:
        if speculative is not None and "model" in speculative:
            deadline = time.monotonic() + 180
            while not sample(until) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert sample(until) == 1, "no draft worker"
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def sample(name: str) -> float:
    """The newest engine's value of one of our metrics."""
    found = 0.0
    for family in REGISTRY.collect():
        for one in family.samples:
            if one.name == f"vllm:double_{name}":
                found = one.value
    return found


def ask(llm: Any) -> Texts:
    """Texts under every condition of a row that V1 knows."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    regex = StructuredOutputsParams(regex=r"( *(self\.)?[a-z_]+ = [a-z_]+\(([a-z_]+, )*[a-z_]+\)\n){1,8}")

    def run(texts: list[str], *params: SamplingParams) -> list[list[int]]:
        return generate(llm, texts, list(params) * (len(texts) // len(params)))

    some = prompts(16)
    long = "\n".join(some)[:800]
    until_full = SamplingParams(temperature=0, max_tokens=MAX_LEN, ignore_eos=True)
    return {
        "one by one": [text for prompt in some[:3] for text in run([prompt], SamplingParams(temperature=0, max_tokens=64))],
        "batch": run(some, SamplingParams(temperature=0, max_tokens=48), SamplingParams(temperature=0, max_tokens=20)),
        "few tokens": run(
            some[:6],
            SamplingParams(temperature=0, max_tokens=1),
            SamplingParams(temperature=0, max_tokens=2),
            SamplingParams(temperature=0, max_tokens=3),
        ),
        "to the model's length": run([long, some[0], some[1]], until_full),
        "prefix cached": run([long, long + "\n"], SamplingParams(temperature=0, max_tokens=24)),
        "penalties": run(some[:4], SamplingParams(temperature=0, max_tokens=40, repetition_penalty=1.2)),
        # vLLM looks for stop strings in text, step by step: tokens that came in the same step stay on the list.
        "stop string": [
            [ord(character) for character in one.text]
            for output in llm.generate(some[:4], SamplingParams(temperature=0, max_tokens=40, stop=["return"]), use_tqdm=False)
            for one in output.outputs
        ],
        "structured": run(some[:2], SamplingParams(temperature=0, max_tokens=24, structured_outputs=regex)),
        "logprobs": run(some[:2], SamplingParams(temperature=0, max_tokens=24, logprobs=2)),
    }


def ask_sampled(llm: Any, drafts: bool = True, num_prompts: int = 3, longest: int = 32, singly: bool = True) -> Texts:
    """Sampled texts with seeds, one by one and in a batch whose rows differ in everything. ``drafts``: False declines them."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    declined = None if drafts else {"double": {"enabled": False}}
    regex = StructuredOutputsParams(regex=r"( *(self\.)?[a-z_]+ = [a-z_]+\(([a-z_]+, )*[a-z_]+\)\n){1,8}")

    def params(seed: int, **settings: Any) -> SamplingParams:
        return SamplingParams(seed=seed, max_tokens=longest, extra_args=declined, **settings)

    conditions = {
        "T 1": params(1, temperature=1.0),
        "T 0.3": params(2, temperature=0.3),
        "greedy": params(3, temperature=0.0),
        "top_p": params(4, temperature=0.7, top_p=0.9),
        "top_k, logprobs": params(-5, temperature=1.5, top_k=20, logprobs=2),
        "min_p": params(1 << 40, temperature=1.0, min_p=0.1),
        "logit_bias": params(7, temperature=1.0, logit_bias={5: 4.0, 83: -100.0}),
        "penalties": params(8, temperature=1.0, repetition_penalty=1.1, presence_penalty=0.3, frequency_penalty=0.2),
        "bias and penalties": params(9, temperature=1.0, repetition_penalty=1.3, logit_bias={5: 4.0}),
        "min_tokens": params(10, temperature=1.0, min_tokens=longest - 4),
        "bad words": params(11, temperature=1.0, bad_words=["self", "return"]),
        "grammar": params(12, temperature=1.0, structured_outputs=regex),
    }
    texts = prompts(num_prompts)
    found: Texts = {}
    if singly:
        found = {name: [generate(llm, [text], one)[0] for text in texts[:1]] for name, one in conditions.items()}
    found["several"] = generate(llm, texts[:1], params(13, temperature=1.0, n=4))
    found["batch"] = generate(llm, [text for text in texts for _ in conditions], list(conditions.values()) * len(texts))
    # More tokens than one step reads: the engine's max_num_batched_tokens decides.
    found["long prompt"] = generate(llm, ["\n".join(prompts(16))[:800]], params(14, temperature=1.0))
    return found


def count(name: str, **labels: str) -> float:
    """A counter's sum over its labels that are not given; engines before this one may be in it."""
    return sum(
        one.value
        for family in REGISTRY.collect()
        for one in family.samples
        if one.name == f"{name}_total" and labels.items() <= one.labels.items()
    )


PAGE = 128  # tokens in a page of the CPU build's KV cache


def begin_with_one_token(llm: Any, args: dict[str, Any] | None = None) -> list[list[int]]:
    """Texts of requests that but for the first begin with one token to compute: behind a cached page, alone and beside a
    request that runs, and with a prompt of one token. args: ``extra_args["double"]``.
    """
    from vllm import SamplingParams

    tokens = llm.get_tokenizer().encode("\n".join(prompts(16)))[PAGE::-1]  # no other request begins so
    whole, one = {"prompt_token_ids": tokens}, {"prompt_token_ids": tokens[:1]}
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=args and {"double": args})
    found = [text for _ in range(2) for text in generate(llm, [whole], params)]
    running, texts = llm.llm_engine, {}
    for number, prompt in enumerate((whole, one)):
        running.add_request(str(number), prompt, params)
        for output in running.step():
            texts[output.request_id] = list(output.outputs[0].token_ids)
    while running.has_unfinished_requests():
        for output in running.step():
            texts[output.request_id] = list(output.outputs[0].token_ids)
    return [*found, texts["0"], texts["1"]]


def check_begins(steps: list[dict[str, Any]]) -> None:
    """Of the steps of ``begin_with_one_token``: what begins with one token costs one."""
    begins: dict[str, tuple[int, list[int]]] = {}
    for step in steps:
        for name, num_tokens in step["tokens"].items():
            begins.setdefault(name, (num_tokens, step["drafts"][name]))
    assert list(begins.values()) == [(PAGE + 1, []), (1, []), (1, []), (1, [])]


def double(**extra: Any) -> dict[str, Any]:
    return {"method": "double", "model": str(PAIR / "draft"), "num_speculative_tokens": 12} | extra


def generate(llm: Any, texts: list[Any], params: Any) -> list[list[int]]:
    return [list(one.token_ids) for output in llm.generate(texts, params, use_tqdm=False) for one in output.outputs]
