"""What requests say about themselves, new weights and resets arrive in the worker: one real engine without a draft model."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.llm import Texts, ask, engine
from vllm_double.integration.request_args import digest

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def llm(plain: Texts) -> Iterator[Any]:
    speculative = {"method": "double", "num_speculative_tokens": 12}
    with engine(speculative, worker_extension_cls="tests.integration.probe.Probe") as llm:
        llm.collective_rpc("probe_start")
        yield llm


def test_texts_with_retrieval_alone_are_those_of_plain_vllm(plain: Texts, llm: Any) -> None:
    assert ask(llm) == plain
    llm.collective_rpc("probe_admitted")


def admitted(llm: Any, double: Any = None, **prompt: Any) -> tuple[str | None, bool]:
    """What the worker knew of a request: its tenant, whether it is drafted for."""
    from vllm import SamplingParams

    extra = None if double is None else {"double": double}
    params = SamplingParams(temperature=0, max_tokens=2, extra_args=extra)
    llm.generate({"prompt": "def f(x):", **prompt}, params, use_tqdm=False)
    ((found,),) = llm.collective_rpc("probe_admitted")
    return tuple(found)


def test_a_request_that_names_nobody_has_no_tenant(llm: Any) -> None:
    assert admitted(llm) == (None, True)


def of_salt_a(tenant: str | None) -> str:
    """A tenant and, before it, its owner."""
    return f"{digest('a')}/{digest('a', tenant, None)}"


def test_the_salt_arrives_at_the_worker(llm: Any) -> None:
    assert admitted(llm, cache_salt="a") == (of_salt_a(None), True)


def test_a_long_salt_becomes_short_and_stays_distinct(llm: Any) -> None:
    first, second = (admitted(llm, cache_salt=letter * 5000)[0] for letter in "ab")
    assert first is not None and second is not None
    assert len(first) == len(second) == 65 and first != second


@pytest.mark.parametrize("double", [{"tenant": "b"}, '{"tenant": "b"}'], ids=["object", "text"])
def test_the_requests_own_tenant_arrives_and_stays_within_its_salt(llm: Any, double: Any) -> None:
    assert admitted(llm, double, cache_salt="a") == (of_salt_a("b"), True)


def test_a_request_that_declines_drafts_gets_none(llm: Any) -> None:
    assert admitted(llm, {"enabled": False}, cache_salt="a") == (of_salt_a(None), False)


@pytest.mark.parametrize("double", [7, "off", {"tenant": 5}, {"enabled": "no"}, {"enable": False}])
def test_a_malformed_request_is_refused_and_the_engine_goes_on(llm: Any, double: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="of a request"):
        admitted(llm, double)
    assert admitted(llm) == (None, True)


@pytest.mark.parametrize("change", ["reload_weights", "probe_load_nothing"])
def test_history_goes_when_the_weights_change(llm: Any, change: str) -> None:
    llm.collective_rpc("probe_forgot")
    llm.collective_rpc("probe_admitted")
    assert llm.collective_rpc("probe_forgot") == [0]
    llm.collective_rpc(change)
    (forgot,) = llm.collective_rpc("probe_forgot")
    assert forgot > 0
    assert admitted(llm) == (None, True)


def test_the_drafts_prefix_cache_goes_with_a_reset(llm: Any) -> None:
    admitted(llm)
    (before,) = llm.collective_rpc("probe_epoch")
    admitted(llm)
    assert llm.collective_rpc("probe_epoch") == [before]
    assert llm.reset_prefix_cache()
    admitted(llm)
    assert llm.collective_rpc("probe_epoch") == [before + 1]
