"""Bad input: one clear sentence and a non-zero exit, before weights are loaded."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_double.cli import main
from vllm_double.config import ConfigError
from vllm_double.hosting.settings import DraftSettings
from vllm_double.integration.launch import draft_settings

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
TARGET, DRAFT = ROOT / "benchmarks/pair/target", ROOT / "benchmarks/pair/draft"
NGRAM = {"method": "ngram", "model": ..., "num_speculative_tokens": 3, "prompt_lookup_max": 3}


def create(speculative: dict[str, object], **arguments: object) -> object:
    from vllm.engine.arg_utils import EngineArgs

    raw = {"method": "double", "model": str(DRAFT), "num_speculative_tokens": 8} | speculative
    raw = {key: value for key, value in raw.items() if value is not ...}
    engine_args = EngineArgs(
        dtype="float32",
        max_model_len=256,
        speculative_config=raw,
        **{"model": str(TARGET), "enforce_eager": True, **arguments},
    )
    return engine_args.create_engine_config()


@pytest.fixture(autouse=True)
def _same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def other_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled draft with two tokens of its tokenizer exchanged."""
    folder = tmp_path_factory.mktemp("other")
    for file in DRAFT.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.__getitem__)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("speculative", "sentence"),
    [
        ({"double": {"draft_core": "1"}}, 'the nearest one is "draft_cores"'),
        ({"num_speculative_token": 3}, 'the nearest one is "num_speculative_tokens"'),
        ({"num_speculative_tokens": ...}, 'needs "num_speculative_tokens"'),
        ({"num_speculative_tokens": 0}, "from 1 to 128"),
        ({"num_speculative_tokens": -1}, "from 1 to 128"),
        ({"num_speculative_tokens": 129}, "from 1 to 128"),
        ({"model": "/no/such/draft"}, "does not exist"),
        ({"model": ..., "quantization": "fp8"}, "there is no"),
        ({"rejection_sample_method": "synthetic"}, "rejection samplers"),
        ({"parallel_drafting": True}, "parallel_drafting"),
        ({"use_heterogeneous_vocab": True}, "another vocabulary"),
        ({"prompt_lookup_max": 4}, "has no meaning"),
        ({"draft_tensor_parallel_size": 0}, "draft_tensor_parallel_size"),
        ({"draft_tensor_parallel_size": 2, "double": {"draft_device": "cuda"}}, "the first of as many devices"),
        ({"draft_tensor_parallel_size": 2, "double": {"draft_cores": "0"}}, "cannot be divided among 2 draft ranks"),
        ({"max_model_len": 4096}, "max_model_len"),
        ({"enforce_eager": "yes"}, "must be true or false"),
        ({"double": {"draft_device": "cuda:7"}}, "no such CUDA device"),
        ({"double": {"draft_cores": "900"}}, "core 900"),
        ({"double": {"ray_address": "127.0.0.1:1"}}, "No Ray cluster answers"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_one_sentence(speculative: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        create(speculative)
    message = str(caught.value)
    assert sentence in message and "\n" not in message


@pytest.mark.parametrize(
    ("model", "fault"), [("s3://bucket/draft", "is an address"), ("{file}", "is a file"), ("/no/such/draft", "does not exist")]
)
def test_the_forms_in_which_a_draft_is_found_are_named(tmp_path: Path, model: str, fault: str) -> None:
    (tmp_path / "draft.gguf").touch()
    model = model.format(file=tmp_path / "draft.gguf")
    with pytest.raises(ConfigError) as caught:
        create({"model": model})
    assert str(caught.value) == (
        f'The draft model "{model}" {fault}: "model" takes a folder that holds config.json and weights, or the name of a '
        'repository, such as "Qwen/Qwen3-0.6B".'
    )


HOW_TO_FIND = {
    "load_format": "dummy",
    "download_dir": "weights",
    "safetensors_load_strategy": "eager",
    "safetensors_prefetch_num_threads": 3,
    "safetensors_prefetch_block_size": 4096,
    "model_loader_extra_config": {"num_threads": 2},
    "ignore_patterns": ["*.bin"],
    "use_tqdm_on_load": False,
    "pt_load_map_location": "meta",
    "config_format": "hf",
    "hf_token": "secret",
}


def test_how_models_are_found_and_read_reaches_the_draft_unless_its_own_key_says_otherwise() -> None:
    from vllm_double.draft.engine.loader import _vllm_config

    def loaded(speculative: dict[str, object]) -> dict[str, Any]:
        settings = DraftSettings.from_json(draft_settings(create(speculative, **HOW_TO_FIND), []).to_json())  # type: ignore[arg-type]
        assert settings.engine is not None
        config = _vllm_config(settings.engine)
        found = {name: getattr(config.load_config, name) for name in HOW_TO_FIND if hasattr(config.load_config, name)}
        model = config.model_config
        return found | {"config_format": model.config_format, "hf_token": model.hf_token}

    expected = HOW_TO_FIND | {"download_dir": str(Path("weights").absolute())}
    assert loaded({}) == expected
    plain = {"load_format": "auto", "download_dir": None, "safetensors_load_strategy": None, "pt_load_map_location": "cpu"}
    own = loaded({"draft_load_config": {"load_format": "safetensors", "use_tqdm_on_load": True}})
    assert {name: own[name] for name in plain} == plain | {"load_format": "safetensors"} and own["hf_token"] == "secret"
    with pytest.raises(ConfigError, match=r"load_fromat.* is not possible"):
        create({"draft_load_config": {"load_fromat": "dummy"}})


def test_models_without_tokenizers_are_taken_if_none_is_needed(tmp_path: Path) -> None:
    for source in (TARGET, DRAFT):
        (tmp_path / source.name).mkdir()
        for file in source.iterdir():
            if "token" not in file.name:
                (tmp_path / source.name / file.name).write_bytes(file.read_bytes())
    models: Any = {"model": str(tmp_path / "target"), "skip_tokenizer_init": True}
    config: Any = create({"model": str(tmp_path / "draft")}, **models)
    assert config.speculative_config.draft["model"] == str(tmp_path / "draft")
    store = tmp_path / "store"
    with pytest.raises(ConfigError, match="The tokenizer of the target cannot be read"):
        create({"double": {"datastore": str(store)}}, **models)


def test_a_draft_with_another_tokenizer_is_refused(other_draft: Path) -> None:
    with pytest.raises(ConfigError, match="another tokenizer than the target"):
        create({"model": str(other_draft)})


def test_pipeline_parallelism_is_refused() -> None:
    with pytest.raises(ConfigError, match="pipeline parallelism"):
        create({}, pipeline_parallel_size=2)


def test_the_external_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # vLLM switches it off for this launcher, for the whole process
    with pytest.raises(ConfigError, match="external launcher"):
        create({}, distributed_executor_backend="external_launcher")


def test_watermarking_is_refused() -> None:
    with pytest.raises(ConfigError, match="watermarking"):
        create({}, watermark_config={"key": 1})


def test_every_engine_of_this_machine_gets_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    bind = "|".join(map(str, cores))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    drafts = {"double": {"draft_cores": ",".join(map(str, cores))}}
    config = create(drafts, data_parallel_size=2).speculative_config  # type: ignore[attr-defined]
    assert config.num_engines == 2 and config.cores.bind == bind
    with pytest.raises(ConfigError, match="cannot be divided among 2 draft ranks"):
        create({"double": {"draft_cores": str(cores[0])}}, data_parallel_size=2)


def test_another_scheduler_is_refused_and_ours_is_chosen() -> None:
    with pytest.raises(ConfigError, match="a scheduler of its own"):
        create({}, scheduler_cls="somebody.Scheduler")
    config: Any = create({})
    assert config.scheduler_config.get_scheduler_cls().__name__ == "DoubleScheduler"
    assert create(NGRAM).scheduler_config.scheduler_cls is None  # type: ignore[attr-defined]


def test_asynchronous_scheduling_is_refused() -> None:
    with pytest.raises(ConfigError, match="synchronous scheduling"):
        create({}, async_scheduling=True)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What vLLM and double said, which goes past the root logger."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger="vllm"):
        yield lambda: [record.getMessage() for record in caplog.records]
    logger.removeHandler(caplog.handler)


def test_asynchronous_scheduling_is_switched_off_with_one_line(said: Callable[[], list[str]]) -> None:
    config: Any = create({})
    assert config.scheduler_config.async_scheduling is False
    told = [line for line in said() if "asynchronous scheduling is off" in line]
    assert len(told) == 1
    assert not [line for line in said() if "Async scheduling not supported" in line], "vLLM says it of custom_class"


@pytest.mark.parametrize(("rank", "lines"), [(-1, 1), (0, 0), (1, 0)])
def test_of_several_front_ends_the_first_process_alone_says_it(
    said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, rank: int, lines: int
) -> None:
    monkeypatch.setenv("_VLLM_DOUBLE_METRICS_KEY", "a test's")
    create({}, _api_process_count=2, _api_process_rank=rank)
    assert len([line for line in said() if "asynchronous scheduling is off" in line]) == lines


def test_the_settings_reach_the_engine_and_the_cores_are_split() -> None:
    config = create({"double": {"nodes_per_iteration": 5}}).speculative_config  # type: ignore[attr-defined]
    assert config.method == "custom_class" and config.num_speculative_tokens == 8
    assert config.double.nodes_per_iteration == 5 and config.draft["model"] == str(DRAFT)
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:
        assert not set(config.cores.draft) & {core for rank in config.cores.target for core in rank}


def test_a_configuration_leaves_the_environment_and_its_arguments_as_they_were() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    create(NGRAM)  # what vLLM itself leaves
    speculative: dict[str, Any] = {"method": "double", "model": str(DRAFT), "num_speculative_tokens": 8}
    args = EngineArgs(model=str(TARGET), max_model_len=256, enforce_eager=True, speculative_config=speculative)
    environment, arguments = dict(os.environ), dict(vars(args))
    config = args.create_engine_config()
    cores = config.speculative_config.cores  # type: ignore[union-attr]
    assert OMPProcessManager(config).cpu_lists == [list(rank) for rank in cores.target]
    assert config.scheduler_config.async_scheduling is False
    assert {name: value for name, value in os.environ.items() if environment.get(name) != value} == {}
    changed = {name: value for name, value in vars(args).items() if arguments.get(name) != value}
    assert not {"scheduler_cls", "async_scheduling", "speculative_config"} & changed.keys()


@pytest.mark.parametrize(("of_target", "of_draft", "expected"), [(True, ..., True), (False, ..., False), (True, False, False)])
def test_the_draft_is_eager_as_it_is_asked_to_be_or_else_as_the_target(of_target: bool, of_draft: Any, expected: bool) -> None:
    config: Any = create({"enforce_eager": of_draft}, enforce_eager=of_target)
    assert config.speculative_config.draft["enforce_eager"] is expected
    engine = draft_settings(config, []).engine
    assert engine is not None and engine.enforce_eager is expected
    assert engine.num_children == config.speculative_config.double.children_per_node


def test_other_methods_get_vllms_own_configuration() -> None:
    from vllm.config import SpeculativeConfig

    config = create(NGRAM).speculative_config  # type: ignore[attr-defined]
    assert type(config) is SpeculativeConfig and config.method == "ngram"


def test_the_server_says_one_sentence_and_exits() -> None:
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(TARGET), "--speculative-config"]
    run = subprocess.run(
        [*command, json.dumps({"method": "double", "num_speculative_tokens": 4, "double": {"enabeld": False}})],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode != 0
    said = [line for line in run.stderr.splitlines() if line.startswith("vllm-double: ")]
    assert len(said) == 1 and "Traceback" not in run.stderr


def test_a_datastore_that_cannot_be_used_is_refused_and_its_own_tokenizers_is_not(tmp_path: Path, other_draft: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        create({"double": {"datastore": str(store)}})
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 20)
    for tokenizer in (other_draft, TARGET):
        command = ["datastore", "build", "--tokenizer", str(tokenizer), "--input", str(tmp_path / "text.txt")]
        assert main([*command, "--output", str(store)]) == 0
        if tokenizer is other_draft:
            with pytest.raises(ConfigError, match="another tokenizer"):
                create({"double": {"datastore": str(store)}})
    create({"double": {"datastore": str(store)}})


_FRESH = """
import sys, vllm.config
before = set(sys.modules)
import vllm_double.integration.speculative_config
print("imported", sorted({"numba", "llvmlite"} & set(sys.modules) - before))
from tests.integration.test_refusals import NGRAM, create
from vllm.v1.worker.gpu import spec_decode
def wrapped():
    functions = (vllm.config.VllmConfig._get_v2_model_runner_unsupported_features, spec_decode.init_speculator)
    return [hasattr(function, "__wrapped__") for function in functions]
create(NGRAM)
print("wrapped", wrapped())
create({})
print("wrapped", wrapped())
"""


def test_reading_the_configuration_imports_no_numba_and_another_method_keeps_the_choice_of_runner() -> None:
    """In a process of its own: in this one method double was configured before."""
    done = subprocess.run([sys.executable, "-c", _FRESH], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith(("imported", "wrapped"))]
    assert told == ["imported []", "wrapped [False, False]", "wrapped [True, True]"]


def test_a_draft_on_the_cpu_beside_a_target_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_double.integration.speculative_config import _check_device

    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(device_type="cuda", is_cpu=lambda: False))
    with pytest.raises(ConfigError, match="this vLLM is built for cuda"):
        _check_device("cpu", 1, 1)
    _check_device("auto", 1, 1)


def test_drafting_that_is_switched_off_keeps_asynchronous_scheduling() -> None:
    config = create({"double": {"enabled": False}}, async_scheduling=True)
    assert config.speculative_config is None  # type: ignore[attr-defined]
