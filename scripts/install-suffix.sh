#!/usr/bin/env bash
# Installs arctic-inference, which vLLM's method "suffix" needs, into an environment for the benchmarks.
#   VENV=.venv scripts/install-suffix.sh
# It is built from source, against the environment's own torch: its build requirements would bring torch 2.7 with CUDA.
# Its dependencies stay out, and so does its plug-in for old vLLM versions, which nothing turns on.
set -euo pipefail

: "${VENV:=.venv}" "${ARCTIC_VERSION:=0.1.1}"
export PIP_DISABLE_PIP_VERSION_CHECK=1
PYTHON=$(cd "$VENV/bin" && pwd)/python

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
echo "Building arctic-inference $ARCTIC_VERSION into $VENV (a minute)"
"$PYTHON" -m pip install -qq --no-warn-conflicts --target "$tools" 'setuptools>=61' wheel ninja 'cmake>=3.12' nanobind==2.9.2 protobuf==5.29.5 grpcio-tools
PYTHONPATH=$tools PATH=$tools/bin:$PATH "$PYTHON" -m pip install -qq --no-deps --no-build-isolation "$@" "arctic-inference==$ARCTIC_VERSION"
