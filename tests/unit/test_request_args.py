"""What a request says about itself, read or refused."""

import time

import pytest

from vllm_double.config import ConfigError
from vllm_double.integration.request_args import RequestArgs, digest


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        (None, RequestArgs()),
        ({}, RequestArgs()),
        ({"other": 1}, RequestArgs()),
        ({"double": {}}, RequestArgs()),
        ({"double": {"enabled": False}}, RequestArgs(enabled=False)),
        ({"double": {"tenant": "a"}}, RequestArgs(tenant="a")),
        ({"double": '{"enabled": false, "tenant": "a"}'}, RequestArgs(False, "a")),
    ],
)
def test_a_request_is_read(extra_args: dict[str, object] | None, expected: RequestArgs) -> None:
    assert RequestArgs.parse(extra_args) == expected


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "takes an object, not one of type NoneType"),
        ([1], "takes an object, not one of type list"),
        (True, "takes an object, not one of type bool"),
        ("off", "text, but not JSON"),
        ("[" * 4096, "text, but not JSON"),
        ("[" * 4097, "more than 4096 characters"),
        ({"tenant": "a" * 257}, '"tenant" in "double" of a request has more than 256 characters'),
        ("[]", "takes an object, not one of type list"),
        ({"enabeld": False}, "no key 'enabeld'; the nearest one is \"enabled\""),
        ({3: False}, "a key of type int"),
        ({10**5000: False}, "a key of type int"),
        ({"enabled": 0}, '"enabled" in "double" of a request must be true or false'),
        ({"enabled": "false"}, '"enabled" in "double" of a request must be true or false'),
        ({"tenant": 7}, '"tenant" in "double" of a request must be text'),
        ({"tenant": ""}, '"tenant" in "double" of a request must be text'),
    ],
)
def test_a_malformed_request_is_refused_in_one_sentence(value: object, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RequestArgs.parse({"double": value})
    message = str(refused.value)
    assert sentence in message and message.endswith(".") and message.count(". ") == 0


def test_a_long_key_is_refused_at_once_and_not_repeated() -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match="the nearest one is") as refused:
        RequestArgs.parse({"double": {"enabled" * 1_000_000: True}})
    assert time.process_time() - started < 0.5 and len(str(refused.value)) < 400


def test_the_longest_tenant_is_taken() -> None:
    assert RequestArgs.parse({"double": {"tenant": "a" * 256}}) == RequestArgs(tenant="a" * 256)


def test_each_value_has_a_name_of_its_own_that_can_be_sent() -> None:
    values: list[object] = ["a", "x" * 5000, "a\n", "\ud800", 5, b"5", None, ("a", 1)]
    names = [digest(value) for value in values] + [digest("a", None), digest(None, "a"), digest(digest("a"))]
    assert len(set(names)) == len(names)
    assert names[: len(values)] == [digest(value) for value in values]
    assert all(len(name) == 32 and name.isascii() for name in names)
