"""A draft whose weights are missing, in a whole engine."""

from pathlib import Path

import pytest
from vllm import SamplingParams

from tests.integration.llm import DRAFT, double, engine, generate, prompts, sample

pytestmark = pytest.mark.integration


@pytest.fixture
def without_weights(tmp_path: Path) -> str:
    for file in DRAFT.iterdir():
        if not file.name.endswith(".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return str(tmp_path)


def test_a_draft_without_weights_is_given_up_and_retrieval_alone_drafts(
    without_weights: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with engine(double(model=without_weights), until="draft_failed") as llm:
        texts = generate(llm, prompts(2), SamplingParams(temperature=0, max_tokens=24))
        assert [len(text) for text in texts] == [24, 24]
        assert (sample("draft_failed"), sample("worker_up"), sample("worker_restarts_total")) == (1, 0, 0)
    said = "".join(capfd.readouterr())
    assert said.count("The draft model cannot work here and is given up: there are no weights of") == 1
    assert "started again" not in said


def test_a_draft_is_loaded_as_its_target(without_weights: str) -> None:
    with engine(double(model=without_weights), load_format="dummy") as llm:
        assert len(generate(llm, prompts(1), SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))[0]) == 24
        assert (sample("draft_failed"), sample("worker_up")) == (0, 1)
