"""What `--hardware` names: data sheets, YAML files and their mistakes, this machine."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from gqa_serve.errors import ConfigError
from gqa_serve.workbench import hardware
from gqa_serve.workbench.hardware import A100, EXAMPLE, H100, NAMED, Hardware, find_hardware
from gqa_serve.workbench.machine import float32_rate, how_measured, measure_machine, read_rate

GOOD = "name: box\nmemory_bytes: 64e9\nbandwidth: 2.0e+11\nfloat32_flops: 1000000000000\nbf16_flops: 4e12\n"


def write(folder: Path, text: str) -> str:
    path = folder / "box.yaml"
    path.write_text(text)
    return str(path)


def test_names() -> None:
    assert find_hardware("h100") is H100
    assert find_hardware("H100") is H100


@pytest.mark.parametrize("hardware", NAMED.values(), ids=NAMED)
def test_data_sheets_are_plausible(hardware: Hardware) -> None:
    """Units mistaken by a thousand, a sparse peak or a link in both directions would show."""
    assert 16e9 <= hardware.memory_bytes <= 300e9
    assert 2e11 <= hardware.bandwidth <= 1e13
    assert 50 <= hardware.peak("bf16") / hardware.bandwidth <= 500
    assert hardware.float32_flops < hardware.bf16_flops
    if hardware.fp8_flops is not None:
        assert hardware.fp8_flops == pytest.approx(2 * hardware.bf16_flops, rel=0.02)
        assert hardware.peak("fp8") == hardware.fp8_flops
    assert hardware.link_bandwidth is not None
    assert hardware.link_bandwidth < hardware.bandwidth / 2
    assert hardware.peak("int8") == hardware.bf16_flops


def test_a_file(tmp_path: Path) -> None:
    found = find_hardware(write(tmp_path, GOOD))
    assert found == Hardware("box", 64e9, 2e11, 1e12, 4e12, None)


def test_the_example_is_a_file(tmp_path: Path) -> None:
    found = find_hardware(write(tmp_path, EXAMPLE))
    assert (found.is_cpu, found.link_bandwidth, found.int8_flops) == (True, 64e9, 24e12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold lines of `field: value`"),
        ("- 1", "must hold lines of `field: value`"),
        ("a: [", "is not YAML"),
        (GOOD + "bandwith: 3", r"no field 'bandwith'. Did you mean bandwidth\?"),
        (GOOD.replace("bandwidth: 2.0e+11\n", ""), "lacks bandwidth. For example"),
        (GOOD.replace("name: box", "name: 3"), "name must be a text; got 3"),
        (GOOD.replace("64e9", "80 GB"), "memory_bytes must be a positive number of bytes, such as 80e9"),
        (GOOD.replace("4e12", "-4e12"), "bf16_flops must be a positive number of operations per second"),
        (GOOD.replace("4e12", "true"), "bf16_flops must be a positive number"),
        (GOOD.replace("4e12", ".nan"), "bf16_flops must be a positive number"),
        (GOOD.replace("4e12", ""), "bf16_flops must be a positive number"),
        (GOOD + "is_cpu: 1", "is_cpu must be true or false"),
        (GOOD + "link_bandwidth: fast", "link_bandwidth must be a positive number of bytes per second"),
        (GOOD + "1: 2", "no field 1"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_hardware(write(tmp_path, text))


def test_unknown_words_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no hardware 'h10'. Did you mean h100\?.*cpu \(this machine"):
        find_hardware("h10")
    with pytest.raises(ConfigError, match=r"Could not read .*No such file"):
        find_hardware(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"Could not read .*Is a directory"):
        find_hardware(str(tmp_path / "folder.yaml"))


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from gqa_serve.workbench import machine

    monkeypatch.setattr(machine, "read_rate", lambda threads: 1e10)
    monkeypatch.setattr(machine, "float32_rate", lambda: 1e11)
    plain = ("Chip", frozenset[str]())
    monkeypatch.setattr(machine, "_processor", lambda: plain)
    found = measure_machine()
    assert (found.bandwidth, found.float32_flops, found.bf16_flops, found.int8_flops) == (
        1e10,
        1e11,
        1e11,
        1e11,
    )
    assert found.is_cpu
    assert found.link_bandwidth is None
    monkeypatch.setattr(machine, "_processor", lambda: ("Chip", frozenset({"avx512_vnni"})))
    assert measure_machine().peak("int8") == 4e11
    tiles = frozenset({"avx512_vnni", "amx_int8", "amx_bf16"})
    monkeypatch.setattr(machine, "_processor", lambda: ("Chip", tiles))
    assert measure_machine().peak("int8") == 32e11
    assert measure_machine().peak("bf16") == pytest.approx(16e11 / 3)


def test_rates_are_measured() -> None:
    """Between what a machine of 1990 and one of 2090 would do: the formula's units."""
    assert 1e8 < read_rate(2, 2**24) < 1e14
    assert 1e7 < float32_rate(256) < 1e15
    assert "measured with numpy" in how_measured()


def test_this_machine_is_measured_once_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants that are compared would else differ by what else the machine did meanwhile."""
    measured = iter([H100, A100])
    monkeypatch.setattr(hardware, "_this_machine", functools.cache(hardware._this_machine.__wrapped__))
    monkeypatch.setattr("gqa_serve.workbench.machine.measure_machine", lambda: next(measured))
    assert find_hardware("cpu") is find_hardware("CPU") is H100
