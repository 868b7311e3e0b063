#!/usr/bin/env bash
# Installs vllm-double, vLLM and the development tools into a virtual environment.
#   VENV=.venv VLLM_VERSION=0.32.0 PYTHON=python3 scripts/install.sh
# With an NVIDIA driver that is plain vLLM; without, its CPU build under the name vllm (packaging/vllm-alias).
set -euo pipefail
cd "$(dirname "$0")/.."

: "${VENV:=.venv}" "${VLLM_VERSION:=0.32.0}" "${PYTHON:=python3}"
export VLLM_VERSION PIP_DISABLE_PIP_VERSION_CHECK=1

rm -f "$VENV"/.installed-*
if [ ! -x "$VENV/bin/python" ]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "vllm-double needs Python 3.10 or newer")'
    "$PYTHON" -m venv "$VENV"
fi

if nvidia-smi >/dev/null 2>&1; then
    echo "Installing vLLM $VLLM_VERSION for CUDA into $VENV (a few minutes)"
    "$VENV/bin/pip" install -qq --no-compile "vllm==$VLLM_VERSION" -e '.[dev]'
else
    echo "Installing the CPU build of vLLM $VLLM_VERSION into $VENV (a few minutes)"
    if ! "$VENV/bin/pip" install -qq --no-compile ./packaging/vllm-alias -e '.[dev]'; then
        echo "If pip did not find torch's CPU build (a version that ends in +cpu), name PyTorch's CPU index in pip's" \
            "configuration (extra-index-url) and run this again." >&2
        exit 1
    fi
    # They come built for another torch; transformers works without them, but not with broken ones.
    for package in torchvision torchaudio torchcodec; do
        "$VENV/bin/python" -c "import $package" >/dev/null 2>&1 ||
            "$VENV/bin/pip" uninstall --quiet --yes "$package" 2>/dev/null
    done
fi

# The bytecode of what servers and draft workers import is written now, once: where the environment forbids Python to write any,
# every process would compile six thousand modules, for half a minute.
env -u PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -c 'import vllm.entrypoints.openai.api_server, vllm.v1.engine.core
import vllm.v1.worker.gpu_model_runner, vllm_double.hosting.actor, vllm_double.draft.engine.vllm_engine' >/dev/null 2>&1 || true

"$VENV/bin/python" -c 'from importlib.metadata import version; print("vLLM", version("vllm"), "with vllm-double", version("vllm-double"))'
touch "$VENV/.installed-$VLLM_VERSION"
