"""The patch table and its gate against the installed vLLM."""

from __future__ import annotations

import importlib
import inspect
import logging
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.integration.mended import BY_NAME, cpu_kernels, without
from vllm_double.cli import main
from vllm_double.integration import hooks as patches
from vllm_double.integration.hooks import registry
from vllm_double.integration.hooks.source import read_function

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

__all__ = ["cpu_kernels"]  # a fixture is used by being imported

INSTALLED = vllm.__version__
INSTALLED_MINOR = ".".join(INSTALLED.split(".")[:2])


# The table


def test_importing_the_table_imports_vllm_or_torch() -> None:
    code = "import sys, vllm_double.integration.hooks; sys.exit(any(name in sys.modules for name in ('vllm', 'torch')))"
    root = Path(patches.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_installed_vllm_differs_from_the_table() -> None:
    assert INSTALLED_MINOR in patches.SUPPORTED
    assert [mismatch.reason for mismatch in patches.check(patches.ENTRIES)] == []


def test_names_or_targets_are_repeated() -> None:
    assert len(BY_NAME) == len(patches.ENTRIES) == len({entry.target for entry in patches.ENTRIES})


@pytest.mark.parametrize("entry", patches.ENTRIES, ids=BY_NAME)
def test_upstream_reference_points_elsewhere(entry: patches.Entry) -> None:
    assert tuple(entry.upstream) == patches.SUPPORTED
    found = read_function(entry.target)
    assert found is not None
    path, line = entry.upstream[INSTALLED_MINOR].split(":")
    assert found.path.replace("\\", "/").endswith(path)
    assert found.line == int(line)


class Global:
    """A default that is a module's global, shown as it is written."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def as_written(parameter: inspect.Parameter, module: ModuleType) -> inspect.Parameter:
    """Without its annotation."""
    default = parameter.default
    if not isinstance(default, type | str | int | float | tuple | None):
        default = next(Global(name) for name, value in vars(module).items() if value is default)
    return parameter.replace(annotation=inspect.Parameter.empty, default=default)


@pytest.mark.parametrize("entry", patches.ENTRIES, ids=BY_NAME)
def test_source_reader_disagrees_with_inspect(entry: patches.Entry) -> None:
    path, _, name = entry.target.partition(":")
    module = importlib.import_module(path)
    function: Any = module
    for part in name.split("."):
        function = getattr(function, part)
    function = getattr(function, "__func__", function)  # a class method's own parameters
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    named = [as_written(parameter, module) for parameter in parameters]
    assert ", ".join(map(str, named)) in [signature.parameters for signature in entry.expected]


def test_a_vllm_that_is_not_installed_is_read_from_its_wheel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(vllm.__file__).parents[1]
    assert main(["check", "--source", str(folder)]) == 0
    sources = [found.path for entry in patches.ENTRIES if (found := read_function(entry.target)) is not None]
    paths = {folder / "vllm/__init__.py", *map(Path, sources)}
    texts = {str(path.relative_to(folder)): path.read_text() for path in paths}
    renamed = {name: text.replace("def _input_fits_in_drafter", "def fits") for name, text in texts.items()}
    wheels = [tmp_path / "same.whl", tmp_path / "renamed.whl", tmp_path / "none.whl"]
    for wheel, files in zip(wheels, (texts, renamed, {"other/__init__.py": ""}), strict=True):
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    capsys.readouterr()
    assert [main(["check", "--source", str(wheel)]) for wheel in wheels] == [0, 1, 2]
    first, *others = capsys.readouterr().err.splitlines()
    assert "_input_fits_in_drafter" in first and "does not exist" in first
    assert len(others) == 1 and "neither a wheel of vLLM" in others[0]


def test_model_runner_takes_another_custom_proposer_factory() -> None:
    runner = importlib.import_module("vllm.v1.worker.gpu_model_runner")
    factory = importlib.import_module("vllm.v1.spec_decode.custom_class_proposer").create_custom_proposer
    assert runner.create_custom_proposer is factory


# The gate


def changed(name: str) -> patches.Entry:
    return replace(BY_NAME[name], expected=(patches.Signature("self, something_else"),), patch=None)


def test_supported_version_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        patches.require(INSTALLED, "cpu")
    assert caplog.records == []


def test_newer_version_with_equal_functions_does_not_start_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm_double"):
        patches.require("0.77.1+cpu", "cpu")
        patches.require("0.77.1+cpu", "cpu")
    assert [record.getMessage().count("0.77.1+cpu") for record in caplog.records] == [1]


def test_mismatch_is_not_refused_in_one_sentence_that_names_it() -> None:
    with pytest.raises(patches.UnsupportedVllm) as refused:
        patches.require("0.33.0", "cpu", [changed("update-states"), changed("propose"), BY_NAME["observe-draft"]])
    message = str(refused.value)
    assert "GPUModelRunner._update_states of vllm.v1.worker.gpu_model_runner takes (self, scheduler_output)" in message
    assert "also changed: GPUModelRunner.propose_draft_token_ids" in message
    assert "observe_draft" not in message
    assert message.endswith(".")
    assert message.count(". ") == 0


@pytest.mark.parametrize("target", ["vllm.no_such_module:function", "vllm.v1.outputs:no_such_function"])
def test_missing_function_is_not_refused(target: str) -> None:
    with pytest.raises(patches.UnsupportedVllm, match="does not exist"):
        patches.require("0.33.0", "cpu", [replace(BY_NAME["update-states"], target=target)])


def test_older_version_is_not_refused() -> None:
    with pytest.raises(patches.UnsupportedVllm, match=r"needs vLLM 0\.31 or newer, and 0\.30\.4 is installed"):
        patches.require("0.30.4", "cpu", [])


def test_unreadable_version_is_not_refused() -> None:
    with pytest.raises(patches.UnsupportedVllm, match="'dev'"):
        patches.require("dev", "cpu", [])


def test_cpu_entries_refuse_other_platforms() -> None:
    broken = replace(BY_NAME["cpu-reject-padding"], expected=(patches.Signature("output", "0"),))
    patches.require(INSTALLED, "cuda", [broken])
    with pytest.raises(patches.UnsupportedVllm):
        patches.require(INSTALLED, "cpu", [broken])


def test_changed_body_is_replaced_all_the_same(cpu_kernels: Any) -> None:
    entry = BY_NAME["cpu-reject-padding"]
    (signature,) = entry.expected
    broken = replace(entry, expected=(replace(signature, fingerprint="0" * 16),))
    with without(entry.name):
        with pytest.raises(patches.UnsupportedVllm, match="the body of _rejection_random_sample_kernel_impl"):
            patches.apply([BY_NAME["cpu-expand-in-place"], broken], INSTALLED)
        assert not patches.is_applied(entry)


def test_replacement_without_a_fingerprint_is_allowed() -> None:
    entry = BY_NAME["cpu-reject-padding"]
    with pytest.raises(ValueError, match="fingerprint"):
        replace(entry, expected=(patches.Signature(entry.expected[0].parameters),))


# Putting mends in place


def test_mends_stack_up_or_do_not_come_off(cpu_kernels: Any) -> None:
    names = [
        "_expand_kernel_impl",
        "_rejection_random_sample_kernel_impl",
        "_sample_recovered_tokens_kernel_impl",
    ]
    mended = [getattr(cpu_kernels, name) for name in names]
    patches.mend_cpu_sampler({})
    assert [getattr(cpu_kernels, name) for name in names] == mended
    patches.revert(patches.MENDS)
    patches.revert(patches.MENDS)
    for entry in patches.MENDS:
        original = getattr(cpu_kernels, entry.function)
        assert original.__module__ == cpu_kernels.__name__
        assert not hasattr(original, "__wrapped__")


@pytest.mark.parametrize("registered_first", [True, False])
def test_mend_is_lost_when_kernels_are_registered_before_or_after_it(cpu_kernels: Any, registered_first: bool) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    patches.revert(patches.MENDS)
    if registered_first:
        current_platform.register_triton_kernel_overrides()
    patches.mend_cpu_sampler({})
    if not registered_first:
        current_platform.register_triton_kernel_overrides()
    for seed in range(3):
        values = torch.rand(64, generator=torch.Generator().manual_seed(seed))
        expanded = expand_batch_to_tokens(values, torch.arange(1, 65, dtype=torch.int32) * 2, 128)
        assert torch.equal(expanded, values.repeat_interleave(2))


def test_switch_leaves_mends_on(cpu_kernels: Any) -> None:
    patches.revert(patches.MENDS)
    assert patches.mend_cpu_sampler({"VLLM_DOUBLE_MEND_CPU_SAMPLER": "0"}) == ()
    assert not any(map(patches.is_applied, patches.MENDS))


def test_unknown_sampler_stops_the_process(
    cpu_kernels: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    patches.revert(patches.MENDS)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, logger="vllm_double"):
        patched.setattr(registry, "read_function", lambda target, root: None)
        assert patches.mend_cpu_sampler({}) == ()
    assert "vLLM's CPU sampler is left as it is" in caplog.text
    assert not any(map(patches.is_applied, patches.MENDS))
