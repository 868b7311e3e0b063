"""The texts that all others are compared with."""

import pytest

from tests.integration.llm import Texts, ask, engine


@pytest.fixture(scope="session")
def plain() -> Texts:
    """On the V1 runner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        with engine(None) as llm:
            return ask(llm)
