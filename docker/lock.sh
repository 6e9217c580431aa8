#!/usr/bin/env bash
# Write docker/requirements*.txt anew: every package of the container, with its version and the hashes of its files.
# Run it from the repository's root, with the container's Python, after constraints.txt has changed:
#     python3.11 -m venv build/lock && build/lock/bin/pip install pip-tools && PATH=$PWD/build/lock/bin:$PATH docker/lock.sh
# PyTorch is left out: the container takes it from the index of CPU builds (docker/Dockerfile.cpu).
set -euo pipefail
cd "$(dirname "$0")/.."
options=(--quiet --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links
  --no-emit-trusted-host --strip-extras --constraint constraints.txt)
pip-compile "${options[@]}" --unsafe-package torch --extra otel --output-file docker/requirements.txt pyproject.toml
printf '%s\n' scikit-build-core nanobind cmake ninja |
  pip-compile "${options[@]}" --output-file docker/requirements-build.txt -
