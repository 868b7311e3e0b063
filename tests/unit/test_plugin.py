"""The entry point: it must never be the reason why a `vllm serve` does not start."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

import vllm_double.plugin as plugin
from vllm_double.config import ConfigError
from vllm_double.integration.hooks import UnsupportedVllm

ROOT = Path(__file__).resolve().parents[2]


class FakeEngineArgs:
    """Stands in for vLLM's EngineArgs."""

    def __init__(self, speculative_config: dict[str, object] | None) -> None:
        self.speculative_config = speculative_config

    scheduler_cls = async_scheduling = None

    @staticmethod
    def add_cli_args(parser: object) -> object:
        return parser

    def create_engine_config(self) -> object:
        return self.create_speculative_config(None, None)

    def create_speculative_config(self, target: object, parallel: object) -> object:
        return ("vllm's own", self.speculative_config)


@pytest.fixture
def engine_args(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngineArgs]:
    kind = type(
        "EngineArgs",
        (FakeEngineArgs,),
        {name: entry for name, entry in vars(FakeEngineArgs).items() if "c" in name and not name.startswith("__")},
    )
    module = types.ModuleType("vllm.engine.arg_utils")
    module.EngineArgs = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", module)
    monkeypatch.setattr("vllm_double.integration.hooks.mend_cpu_sampler", lambda: ())
    return kind


@pytest.mark.parametrize("config", [None, {"method": "ngram", "num_speculative_tokens": 3}, {"model": "m"}])
def test_other_methods_are_vllms_own(engine_args: type[FakeEngineArgs], config: dict[str, object] | None) -> None:
    plugin.register()
    plugin.register()
    assert engine_args(config).create_speculative_config(None, None) == ("vllm's own", config)


def test_registering_survives_anything(monkeypatch: pytest.MonkeyPatch, engine_args: type[FakeEngineArgs]) -> None:
    def fail() -> None:
        raise RuntimeError("whatever")

    monkeypatch.setattr("vllm_double.integration.hooks.mend_cpu_sampler", fail)
    plugin.register()
    assert engine_args(None).create_speculative_config(None, None) == ("vllm's own", None)


def test_a_vllm_that_does_not_fit_refuses_only_our_method(
    monkeypatch: pytest.MonkeyPatch, engine_args: type[FakeEngineArgs]
) -> None:
    def refuse(entries: object) -> None:
        raise UnsupportedVllm("vLLM 9.9 changed propose_draft_token_ids.")

    monkeypatch.setattr("vllm_double.integration.hooks.require", refuse)
    plugin.register()
    with pytest.raises(UnsupportedVllm, match=r"vLLM 9\.9 changed"):
        engine_args({"method": "double"}).create_speculative_config(None, None)
    assert engine_args({"method": "ngram"}).create_speculative_config(None, None) is not None


def test_the_command_line_gets_a_sentence_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, engine_args: type[FakeEngineArgs], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(entries: object) -> None:
        raise ConfigError("No such thing.")

    monkeypatch.setattr("vllm_double.integration.hooks.require", refuse)
    monkeypatch.setattr(plugin, "_is_command", lambda: True)
    plugin.register()
    with pytest.raises(SystemExit) as caught:
        engine_args({"method": "double"}).create_speculative_config(None, None)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "vllm-double: No such thing.\n"


def test_importing_the_entry_point_imports_next_to_nothing() -> None:
    code = (
        "import sys, vllm_double.plugin\n"
        "heavy = {'torch', 'vllm', 'numpy', 'ray', 'pydantic', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_seams_need_neither_vllm_nor_ray_nor_torch() -> None:
    code = (
        "import sys\n"
        "import vllm_double.target.proposer, vllm_double.target.verify_length, vllm_double.target.guarded_proposer\n"
        "import vllm_double.draft.worker, vllm_double.draft.engine.base, vllm_double.transport.inprocess\n"
        "import vllm_double.retrieval\n"
        "import vllm_double.operations.metrics, vllm_double.operations.switch, vllm_double.hosting.supervisor\n"
        "heavy = {'torch', 'vllm', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_name_kernels_goes_to_the_real_package_wherever_it_lies(tmp_path: Path) -> None:
    """`kernels` is Hugging Face's, and transformers imports it: a folder of ours without __init__.py never wins."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "benchmarks/kernels.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("get_kernel = 'the real one'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); from kernels import get_kernel; import double_kernels"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_wheel_has_no_top_level_kernels() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'packages = ["vllm_double", "kernels/double_kernels"]' in text
