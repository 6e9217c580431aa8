"""The native extension: that it is there, which instruction sets it offers, how it is packaged.

Where it could not be built, tests that need it are skipped; in CI, which has a compiler, they fail instead.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gqa_serve import __version__
from gqa_serve.config import EngineConfig, collect
from gqa_serve.engine.backends import BackendOptions, create_backend
from gqa_serve.engine.kernels import cpu
from gqa_serve.errors import ConfigError

ROOT = Path(__file__).parent.parent
KERNELS = "gqa_serve/engine/kernels/cpu/"
EXTENSION = KERNELS + "_native"
ISA_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "amx": {"avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"},
    "neon": {"asimddp", "asimdhp"},
}


@pytest.fixture(scope="module")
def native() -> ModuleType:
    """The extension; a failure to load it is a failure where it must have been built."""
    try:
        return cpu.load()
    except cpu.NativeUnavailableError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"the native backend is not available: {error}")


def run(code: str, *flags: str, **environ: str) -> str:
    """What a fresh Python prints."""
    result = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | environ,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_isa_levels_are_the_processors(native: ModuleType) -> None:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("needs /proc/cpuinfo")
    line = next(line for line in info.read_text().splitlines() if line.startswith(("flags", "Features")))
    flags = set(line.split(":")[1].split())
    candidates = ("avx2", "avx512", "amx") if platform.machine() == "x86_64" else ("neon",)
    assert native.isa_levels() == [name for name in candidates if ISA_FLAGS[name] <= flags]


def test_every_level_serves(native: ModuleType) -> None:
    for isa in native.isa_levels():
        (config,) = collect([EngineConfig], {}, {"GQA_SERVE_CPU_ISA": isa})
        assert config.cpu_isa == isa
        backend = create_backend(torch.device("cpu"), BackendOptions(backend="native", cpu_isa=isa))
        assert backend.name == "native"


def test_unknown_and_unsupported_levels_are_refused(native: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"GQA_SERVE_CPU_ISA .*sse2") as unknown:
        collect([EngineConfig], {}, {"GQA_SERVE_CPU_ISA": "sse2"})
    assert "avx2" in str(unknown.value)
    other = "neon" if "neon" not in native.isa_levels() else "avx2"
    with pytest.raises(ConfigError, match=f"cpu-isa {other}") as unsupported:
        create_backend(torch.device("cpu"), BackendOptions(backend="native", cpu_isa=other))
    assert all(isa in str(unsupported.value) for isa in native.isa_levels())


def test_one_openmp_runtime_and_it_is_torchs(native: ModuleType) -> None:
    code = f"""
import sys
from gqa_serve.engine.kernels.cpu import _native
def runtimes():
    files = {{line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}}
    return sorted(f for f in files if f.rsplit("/", 1)[-1].startswith(("libgomp", "libomp", "libiomp")))
assert "torch" not in sys.modules
assert runtimes() == [], runtimes()
assert "import torch first" in _native.team_error()
import torch
assert _native.team_error() == ""
_native.Program({native.isa_levels()[0]!r}, 2)
assert len(runtimes()) == 1, runtimes()
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    run(code)


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (SimpleNamespace(isa_levels=list, team_error=str), "AVX2 with FMA"),
        (SimpleNamespace(isa_levels=lambda: ["avx2"], team_error=lambda: "no threads"), "no threads"),
    ],
)
def test_reasons_why_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, fake: SimpleNamespace, reason: str
) -> None:
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(cpu.importlib, "import_module", lambda _: fake)
    with pytest.raises(cpu.NativeUnavailableError, match=reason):
        cpu.load()


def test_a_missing_extension_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(cpu.NativeUnavailableError, match="not part of this installation"):
        cpu.load()


def test_an_extension_of_another_system_has_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = next(s for s in EXTENSION_SUFFIXES if "." in s)
    (tmp_path / f"_broken{suffix}").write_bytes(b"not a library")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cpu, "_EXTENSION", "_broken")
    with pytest.raises(cpu.NativeUnavailableError, match=r"cannot be loaded: .*_broken"):
        cpu.load()


# --- packages ---


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of this source tree, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    code = "from scikit_build_core.build import build_sdist as b; import sys; print(b(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def build_wheel(
    source: Path, target: Path, *options: str, **environ: str
) -> subprocess.CompletedProcess[str]:
    """`pip wheel`, with the build tools of this environment."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
            *("-w", str(target), *options, str(source)),
        ],
        capture_output=True,
        text=True,
        env=os.environ | environ,
        check=False,
    )


@pytest.mark.slow
def test_wheel_from_an_sdist(native: ModuleType, sdist: Path, tmp_path: Path) -> None:
    assert sdist.name == f"gqa_serve-{__version__}"
    sources = {path.name for path in (ROOT / KERNELS).iterdir() if path.suffix in (".cpp", ".h", ".inl")}
    assert len(sources) > 10
    assert sources <= {path.name for path in (sdist / KERNELS).iterdir()}
    assert not list(sdist.rglob("*.so"))
    build = tmp_path / "build"
    result = build_wheel(sdist, tmp_path, f"-Cbuild-dir={build}", GQA_SERVE_REQUIRE_NATIVE="1")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len([name for name in names if name.startswith(EXTENSION)]) == 1
    assert KERNELS + "__init__.py" in names
    assert "gqa_serve/api/web/docs.html" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".inl"))]
    assert not wheel.name.endswith("py3-none-any.whl")
    for isa in native.isa_levels():
        check_symbols(isa, build)


def check_symbols(isa: str, build: Path) -> None:
    """An instruction set's objects define its two tables and nothing else that the linker could pick for
    code that runs on other processors (a weak symbol of a standard template, say)."""
    objects = sorted((build / "CMakeFiles" / f"kernels_{isa}.dir").rglob("*.o"))
    assert len(objects) == 2
    lines = subprocess.run(
        ["nm", "-C", "--defined-only", *map(str, objects)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    symbols = [line.split(maxsplit=2)[1:] for line in lines if len(line.split(maxsplit=2)) == 3]
    shared = sorted(name for kind, name in symbols if kind not in "bdrt")
    assert shared == [f"gqa::kernels_{isa}()", f"gqa::peak_loops_{isa}()"]


@pytest.mark.slow
def test_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    """The install succeeds, serves by plain torch and says so; it fails where native kernels are required."""
    refused = build_wheel(sdist, tmp_path, CXX="/bin/false", GQA_SERVE_REQUIRE_NATIVE="1")
    assert refused.returncode != 0
    assert "CMake configuration failed" in refused.stdout + refused.stderr
    result = build_wheel(sdist, tmp_path, CXX="/bin/false", GQA_SERVE_REQUIRE_NATIVE="0")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith(EXTENSION)]
        archive.extractall(site)
    code = """
import gqa_serve, torch
from gqa_serve.engine.backends import BackendOptions, create_backend
print(gqa_serve.__file__)
print(create_backend(torch.device("cpu"), BackendOptions()).name)
"""
    packages = [path for path in sys.path if path.endswith("site-packages")]
    # -S: without the .pth files of this environment, one of which leads to the source tree.
    printed = run(code, "-S", PYTHONPATH=os.pathsep.join([str(site), *packages]))
    assert str(site) in printed
    assert "reference" in printed.splitlines()
    assert "not part of this installation" in printed
    assert "C++20 compiler" in printed
