"""A draft model on two ranks in a real engine. What its ranks compute is tested in test_draft_ranks.py."""

import os
import time

import psutil
import pytest

from tests.integration.llm import Texts, count, double, draft_actors, engine, generate, prompts

CORES = sorted(os.sched_getaffinity(0))[:2]

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(len(CORES) < 2, reason="two ranks need two cores"),
]


def test_texts_are_those_of_plain_vllm_and_the_ranks_draft(plain: Texts) -> None:
    from vllm import SamplingParams

    drafts = double(draft_tensor_parallel_size=2, double={"draft_cores": ",".join(map(str, CORES))})
    with engine(drafts, str(CORES[0])) as llm:
        children = psutil.Process().children(recursive=True)
        assert len(draft_actors()) == 2
        # Ranks that share their cores with the target spin in all-reduces while one of them has none: the target gives way.
        for child in children:
            if child.name().startswith("VLLM::"):
                child.nice(10)
        # How long it takes until something is ready depends on the machine.
        params, published = SamplingParams(temperature=0, max_tokens=64), count("vllm:double_worker_nodes_published")
        deadline, num_asked = time.monotonic() + 240, 0
        while count("vllm:double_worker_nodes_published") == published or num_asked < 3:
            assert time.monotonic() < deadline, "the ranks draft nothing"
            number = num_asked % 3
            assert generate(llm, [prompts(3)[number]], params) == [plain["one by one"][number]]
            num_asked += 1
