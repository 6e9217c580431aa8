#!/usr/bin/env bash
# Write docker/requirements*.txt anew: every package of the containers, with its version and the hashes of its files.
# Run it from the repository's root after constraints.txt or pyproject.toml has changed:
#     python3 -m venv build/lock && build/lock/bin/pip install uv && PATH=$PWD/build/lock/bin:$PATH docker/lock.sh
# requirements.txt holds what the server needs but for torch and what only torch's CUDA build brings along: that is
# requirements-cuda.txt, for docker/Dockerfile.cuda. docker/Dockerfile.cpu takes torch from the index of CPU builds.
set -euo pipefail
cd "$(dirname "$0")/.."
lock() {
  uv pip compile --quiet --no-config --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --generate-hashes --no-header --no-annotate --constraint constraints.txt "$@" >/dev/null
}
lock --output-file docker/requirements-cuda.txt - <<<torch
mapfile -t cuda < <(grep -oE '^(torch|triton|(nvidia|cuda)-[a-z0-9-]+)' docker/requirements-cuda.txt)
lock --extra otel "${cuda[@]/#/--no-emit-package=}" --output-file docker/requirements.txt pyproject.toml
printf '%s\n' scikit-build-core nanobind cmake ninja | lock --output-file docker/requirements-build.txt -
