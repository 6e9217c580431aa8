"""What goes into the container: pinned by hash, in versions that are tested here; a server without rights."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

DOCKER = Path(__file__).parent.parent / "docker"
PINNED = re.compile(
    r"([A-Za-z0-9._-]+)==([^\s;\\]+)(?: ; [^\\]+)?((?:\s*\\\n\s+--hash=sha256:[0-9a-f]{64})*)"
)
LISTS = ("requirements.txt", "requirements-build.txt")


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
    assert wanted - set(packages) == {"torch"}  # which comes from the index of CPU builds
    for requirement in required:
        if (name := canonicalize_name(requirement.name)) in packages and name in wanted:
            assert requirement.specifier.contains(packages[name][0]), f"{name}: run docker/lock.sh"


def test_installs_check_hashes_and_the_server_has_no_rights() -> None:
    text = (DOCKER / "Dockerfile.cpu").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    installs = [line for line in lines if re.search(r"pip install .*(-r |-c )", line)]
    assert len(installs) == 3
    assert [line for line in installs if "--require-hashes" not in line and not line.endswith(" torch")] == []
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["10001:10001"]
    assert lines.index("USER 10001:10001") > max(n for n, line in enumerate(lines) if line.startswith("RUN "))
