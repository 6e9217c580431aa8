"""Images without a Docker engine or a registry: buildah, over a base image made by debootstrap.

Knows how this machine's pip reaches its packages, since a build has to reach them likewise. Whatever is made
lies in one folder, and is gone with it. Needs root.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RELEASE = "bookworm"
PACKAGES = "ca-certificates,python3,python3-venv,python3-dev"  # what python:3.11-slim has, too
PIP_SETTINGS = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "cert", "timeout")


def missing() -> str | None:
    """Why no image can be built here."""
    if os.geteuid() != 0:
        return "building images needs root"
    tools = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    return f"{' and '.join(tools)} not installed" if tools else None


class Buildah:
    """Images and containers of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._words = ["buildah", "--storage-driver", "vfs"]
        self._words += ["--root", str(folder / "store"), "--runroot", str(folder / "run")]

    def words(self, *words: str) -> list[str]:
        return [*self._words, *words]

    def __call__(self, *words: str) -> str:
        """What a command prints."""
        result = subprocess.run(self.words(*words), capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{words}: {result.stdout[-4000:]}{result.stderr[-4000:]}"
        return result.stdout

    def base(self, name: str) -> None:
        """A minimal Debian with Python."""
        root = self.folder / "base"
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(root)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-4000:]
        for package in (root / "var/cache/apt/archives").glob("*.deb"):
            package.unlink()
        container = self("from", "scratch").strip()
        self("add", "--quiet", container, str(root), "/")
        self("commit", "--quiet", "--rm", container, name)
        shutil.rmtree(root)

    def build(self, dockerfile: Path, context: Path, name: str, **arguments: str) -> None:
        """`docker build`, with this machine's way to packages."""
        given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        volumes = [f"--volume={source}:{target}:ro" for source, target in self._package_volumes()]
        self(
            *("build", "--isolation", "chroot", "--format", "docker", "--layers=false"),
            *("--file", str(dockerfile), "--ignorefile", f"{dockerfile}.dockerignore"),
            *given, *volumes, "--tag", name, str(context),
        )  # fmt: skip

    def _package_volumes(self) -> Iterator[tuple[Path, Path]]:
        """pip's settings, and the files and folders that they name, each at its own place."""
        settings = pip_settings()
        lines = [f"{name} = {value}" for name, value in settings.items()]
        (file := self.folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
        yield file, Path("/etc/pip.conf")
        for path in local_paths(settings):
            yield path, path

    def config(self, image: str) -> dict[str, Any]:
        """What a Dockerfile's ENV, USER, ENTRYPOINT, HEALTHCHECK, ... became."""
        return json.loads(self("inspect", "--type", "image", image))["Docker"]["config"]

    def size(self, image: str) -> int:
        """In bytes, all layers together, not compressed."""
        layers = json.loads(json.loads(self("inspect", "--type", "image", image))["Manifest"])["layers"]
        return sum(layer["size"] for layer in layers)

    def run_words(self, container: str, command: Sequence[str], *options: str) -> list[str]:
        """The words that run a command in a container, as its image's user, in this machine's network."""
        return self.words("run", "--isolation", "chroot", *options, container, "--", *command)


@contextmanager
def workshop() -> Iterator[Buildah]:
    """A folder for images, and nothing left of it afterwards; gigabytes, so not one that pytest keeps."""
    folder = Path(tempfile.mkdtemp(prefix="gqa-serve-images-"))
    buildah = Buildah(folder)
    try:
        yield buildah
    finally:
        buildah("rm", "--all")
        buildah("rmi", "--all", "--force")
        shutil.rmtree(folder)


def pip_settings() -> dict[str, str]:
    """How pip reaches packages on this machine, from its files and variables."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(?m)^\S+?\.([a-z-]+)=(.*)$", listed)  # of one setting, the last counts
    return {name: str(ast.literal_eval(value)) for name, value in found if name in PIP_SETTINGS}


def local_paths(settings: dict[str, str]) -> list[Path]:
    """What settings name that lies on this machine's disk. An index's files may lie beside it."""
    words = [word.removeprefix("file://") for value in settings.values() for word in value.split()]
    paths = {path for word in words if (path := Path(word)).is_absolute() and path.exists()}
    return sorted({path.parent if path.name == "simple" else path for path in paths})


def torch_options(version: str) -> dict[str, str]:
    """Build arguments: torch from this machine's own CPU wheels, or else from the Dockerfile's index."""
    folders = [Path(word) for word in pip_settings().get("find-links", "").split()]
    kept = any(any(folder.glob(f"torch-{version}+cpu-*.whl")) for folder in folders if folder.is_dir())
    return {"TORCH_OPTIONS": ""} if kept else {}
