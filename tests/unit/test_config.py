import pytest

from vllm_double.config import ConfigError, DoubleConfig, check_num_speculative_tokens


def test_defaults_are_what_no_setting_gives() -> None:
    assert DoubleConfig.parse(None) == DoubleConfig.parse({}) == DoubleConfig()


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"draft_core": "1"}, "no setting 'draft_core'; the nearest one is \"draft_cores\""),
        ({"nodes_per_iteration": 0}, "nodes_per_iteration"),
        ({"draft_device": "gpu"}, "draft_device"),
        ({"ray_address": "localhost"}, 'not of the form "host:port"'),
        ({"ray_address": "ray://h:1"}, 'not of the form "host:port"'),
        ("fast", "takes an object"),
        ({"require_salt": True, "share_history": True}, "share what its tenant may not"),
    ],
)
def test_a_setting_that_cannot_work_is_one_sentence(raw: object, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DoubleConfig.parse(raw)
    message = str(caught.value)
    assert sentence in message and "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("value", [None, 0, -3, 129, 2.5, "8", True])
def test_a_chain_length_that_cannot_work_is_one_sentence(value: object) -> None:
    with pytest.raises(ConfigError, match="num_speculative_tokens") as caught:
        check_num_speculative_tokens(value)
    assert "\n" not in str(caught.value)


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DoubleConfig().enabled = False  # type: ignore[misc]
