"""Every kernel compiles for a GPU, on a machine that has none: triton's interpreter takes Python that its compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from typing import Any

import pytest

_LOGITS = {"fp16": 16, "bf16": 16, "fp32": 32}
_TARGET = ("cuda", 90, 32)
_CALLED_BY_OTHERS = {"_keys", "_rank_keys", "_is_among_best", "_tempered", "gumbel_noise_of", "_mixed"}


def variants() -> dict[str, list[tuple[dict[str, str], dict[str, Any]]]]:
    """Of each kernel: the types of pointers that are not to int32 (other arguments are int32), and its constants."""
    import triton.language as tl

    words = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
    sizes = {"SIZE_0": 1, "SIZE_1": 2, "SIZE_2": 3, "NUM_COLUMNS": 9, "BLOCK_ROWS": 8, "BLOCK_COLUMNS": 16}
    tokens = {"input_ids_ptr": "*i64", "positions_ptr": "*i64", "slot_mapping_ptr": "*i64", "tokens_ptr": "*i64"}
    sums = {"temperatures_ptr": "*fp32", "maxima_ptr": "*fp32", "sums_ptr": "*fp32", "probs_ptr": "*fp32"}
    noise = {"seeds_ptr": "*i64", "scales_ptr": "*fp32", "floors_ptr": "*fp32"}
    plain = [(dtype, has, False, False) for dtype, has in product(_LOGITS, (False, True))]
    perturbed = [
        ("fp32", True, True, False),
        ("fp32", True, False, True),
        ("fp32", True, True, True),
        ("bf16", False, True, True),
    ]
    logits = []
    for dtype, has_temperatures, has_noise, has_support in plain + perturbed:
        constants: dict[str, Any] = {"KEY_BITS": 32 if has_noise or has_support else _LOGITS[dtype], "BLOCK": 64}
        if not has_temperatures:
            constants["temperatures_ptr"] = None
        if not has_noise:
            constants |= {"seeds_ptr": None, "positions_ptr": None, "scales_ptr": None}
        if not has_support:
            constants["floors_ptr"] = None
        logits.append(({"logits_ptr": f"*{dtype}", **sums, **tokens, **noise}, constants))
    return {
        "_copy_slots": [
            ({"table_ptr": "*i64"}, sizes | {"WORD": word, "WORD_BYTES": size, "ALIGNMENT": size, "SLOTS_ARE_COLUMNS": columns})
            for (size, word), columns in product(words.items(), (False, True))
        ],
        "_reduce_tiles": [(types, shared | {"TILE_BLOCKS": 64}) for types, shared in logits],
        "_select_tokens": [(types, shared | {"BLOCKS": 512, "TILES": 8, "CHILDREN": 64}) for types, shared in logits],
        "_sample_blocks": [({"logits_ptr": "*fp32", "scores_ptr": "*fp32", **tokens, **noise}, {"BLOCK": 1024})],
    }


def compile_all() -> None:
    """Raises what the compiler raises; prints how many binaries there are of each kernel."""
    import triton
    from double_kernels import triton_fork_pages, triton_noise, triton_top_branches
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    of_kernel = variants()
    for module in (triton_fork_pages, triton_noise, triton_top_branches):
        for name, kernel in vars(module).items():
            if not isinstance(kernel, triton.JITFunction) or name in _CALLED_BY_OTHERS:
                continue
            for types, constants in of_kernel[name]:
                signature = {argument: "*i32" if argument.endswith("_ptr") else "i32" for argument in kernel.arg_names}
                signature |= {argument: kind for argument, kind in types.items() if argument in signature}
                signature |= dict.fromkeys(constants, "constexpr")
                source = ASTSource(kernel, signature, constexprs=constants)
                assert triton.compile(source, target=GPUTarget(*_TARGET)).asm["ptx"]
            print(name, len(of_kernel[name]))


@pytest.mark.timeout(300)
def test_every_kernel_compiles_without_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.splitlines()) == len(variants())


if __name__ == "__main__":
    compile_all()
