"""What releases are made of says one thing: one version, one range of Pythons, one kind of wheel for each."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gqa_serve import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


def test_the_version_is_written_down_once() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["dynamic-metadata"][0]["input"] == "gqa_serve/__init__.py"
    folders = ("gqa_serve", "docs", "docker", "benchmarks", ".ci", ".github")
    files = [
        *(
            file
            for file in ROOT.glob("*")
            if file.suffix in (".md", ".toml", ".txt") or file.name == "Makefile"
        ),
        *(
            file
            for folder in folders
            for file in (ROOT / folder).rglob("*")
            if "__pycache__" not in file.parts
        ),
    ]
    own = re.compile(
        rf"(gqa.serve\W{{0,4}}v?|__version__ = \"|\bversion\W{{1,3}}){re.escape(__version__)}\b", re.I
    )
    found = {
        str(file.relative_to(ROOT))
        for file in files
        if file.is_file() and file.name != "CHANGELOG.md" and file.suffix not in (".so", ".svg")
        if own.search(file.read_text(encoding="utf-8"))
    }
    assert found == {"gqa_serve/__init__.py"}


def test_the_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0].startswith(f"{__version__} - ")
    released = [heading for heading in headings if heading != "Unreleased"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", heading) for heading in released)


def test_one_range_of_pythons() -> None:
    project = PROJECT["project"]
    assert project["requires-python"] == f">={PYTHONS[0]}"
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert tuple(classified) == PYTHONS
    assert PROJECT["tool"]["mypy"]["python_version"] == PYTHONS[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == "py310"
    table = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert all(re.search(rf"^\| {re.escape(python)} \|", table, re.MULTILINE) for python in PYTHONS)


def test_wheels_of_a_release_have_kernels_for_each_python() -> None:
    wheels = PROJECT["tool"]["cibuildwheel"]
    assert wheels["build"] == "{cp310,cp311,cp312}-manylinux_*"
    (native,) = (
        override
        for override in PROJECT["tool"]["scikit-build"]["overrides"]
        if override.get("wheel", {}).get("cmake") is True
    )
    assert native["wheel"]["py-api"] == "cp312"  # so that 3.13 and later need no wheel of their own
    assert wheels["environment"]["GQA_SERVE_REQUIRE_NATIVE"] == "1"
    assert "tests/release/new_user.py" in wheels["test-command"]


def test_no_kernels_are_made_for_the_machine_that_builds() -> None:
    files = [
        ROOT / "CMakeLists.txt",
        ROOT / "pyproject.toml",
        ROOT / "Makefile",
        *ROOT.glob("docker/Dockerfile*"),
    ]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert not re.search(r"-m(arch|cpu|tune)=native", text)


@pytest.mark.skipif(not WORKFLOW.exists(), reason="an sdist has no workflows")
def test_a_release_trusts_no_moving_target() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert len(used) > 5
    assert [name for name in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name)] == []
    assert workflow["jobs"]["publish"]["environment"] == "pypi"
    assert [name for name, job in workflow["jobs"].items() if "id-token" in job["permissions"]] == ["publish"]
    assert "secrets." not in WORKFLOW.read_text(encoding="utf-8")


@pytest.mark.skipif(not WORKFLOW.exists(), reason="an sdist has no workflows")
def test_what_the_packages_bring_is_published_with_them() -> None:
    """The index takes no SBOM, and an artifact of a workflow is deleted after some weeks."""
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    assert [name for name, job in jobs.items() if job["permissions"].get("contents") == "write"] == ["page"]
    assert jobs["page"]["needs"] == "publish"  # and so, as that, only for a tag
    assert jobs["publish"]["if"] == "github.event_name == 'push'"
    *fetched, made = jobs["page"]["steps"]
    assert [step["with"]["path"] for step in fetched] == ["dist", "sbom"]
    assert made["run"].endswith("dist/* sbom/*.cdx.json\n")
