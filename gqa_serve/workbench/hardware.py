"""Devices as their data sheets describe them, and the words of `--hardware`.

Owns the numbers and where they come from. They are peaks: what a kernel reaches is measured, not written
here. Imports no torch, because the planning tools read it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from gqa_serve.errors import ConfigError
from gqa_serve.settings import did_you_mean, short

Precision = Literal["float32", "bf16", "fp8", "int8"]


@dataclass(frozen=True)
class Hardware:
    """A data sheet: memory in bytes, bandwidth in bytes/s, dense peaks in operations/s (a multiply-add is
    two).

    `float32_flops` is of ordinary arithmetic, the others of tensor cores; without fp8 tensor cores, numbers
    in fp8 are multiplied as bf16. `link_bandwidth`: bytes/s that one device sends to its neighbours while
    it receives as many; None where nothing is known. `is_cpu`: served by the native backend, whose
    activations are float32. `int8_flops` is of its products of integer weights; None, as on GPUs, which
    widen such weights: as bf16.
    """

    name: str
    memory_bytes: float
    bandwidth: float
    float32_flops: float
    bf16_flops: float
    fp8_flops: float | None
    link_bandwidth: float | None = None
    is_cpu: bool = False
    int8_flops: float | None = None

    def peak(self, precision: Precision) -> float:
        """Operations per second."""
        if precision == "float32":
            return self.float32_flops
        if precision == "fp8" and self.fp8_flops is not None:
            return self.fp8_flops
        if precision == "int8" and self.int8_flops is not None:
            return self.int8_flops
        return self.bf16_flops


# Memory is the data sheet's, in powers of ten; drivers report some per cent more. NVIDIA prints tensor-core
# peaks of Ada, Hopper and Blackwell with 2:4 sparsity too: twice these. Products add up in float32. A link is
# one direction: half of what data sheets print for NVLink; PCIe 4.0 x16 carries 16 lanes * 16 GT/s * 128/130.
_PCIE_4 = 31.5e9
A100 = Hardware(
    "A100 80GB SXM", 80e9, 2.039e12, 19.5e12, 312e12, None, 300e9
)  # "NVIDIA A100 Tensor Core GPU"
A100_40GB = Hardware(
    "A100 40GB SXM", 40e9, 1.555e12, 19.5e12, 312e12, None, 300e9
)  # "NVIDIA A100 Tensor Core GPU"
H100 = Hardware(
    "H100 SXM", 80e9, 3.35e12, 66.9e12, 989.4e12, 1978.9e12, 450e9
)  # "NVIDIA H100 Tensor Core GPU"
H200 = Hardware(
    "H200 SXM", 141e9, 4.8e12, 66.9e12, 989.4e12, 1978.9e12, 450e9
)  # "NVIDIA H200 Tensor Core GPU"
B200 = Hardware(
    "B200", 180e9, 8.0e12, 80e12, 2250e12, 4500e12, 900e9
)  # "NVIDIA DGX B200": an eighth of the system's
A10 = Hardware("A10", 24e9, 600e9, 31.2e12, 125e12, None, _PCIE_4)  # "NVIDIA A10 Tensor Core GPU"
L4 = Hardware("L4", 24e9, 300e9, 30.3e12, 121e12, 242.5e12, _PCIE_4)  # "NVIDIA L4 Tensor Core GPU"
L40S = Hardware("L40S", 48e9, 864e9, 91.6e12, 362.05e12, 733e12, _PCIE_4)  # "NVIDIA L40S GPU"
RTX_3090 = Hardware(
    "RTX 3090", 24e9, 936.2e9, 35.6e12, 71e12, None, _PCIE_4
)  # "NVIDIA Ampere GA102 GPU Architecture", table 9; its link over NVLink is a bridge of two, not counted
RTX_4090 = Hardware(
    "RTX 4090", 24e9, 1.008e12, 82.6e12, 165.2e12, 330.3e12, _PCIE_4
)  # "NVIDIA Ada GPU Architecture", appendix A: peaks with float32 accumulation
GPUS = (A100, H100, H200, B200)
"""Those of docs/cuda.md."""

NAMED: dict[str, Hardware] = {
    "a100": A100,
    "a100-40gb": A100_40GB,
    "h100": H100,
    "h200": H200,
    "b200": B200,
    "a10": A10,
    "l4": L4,
    "l40s": L40S,
    "rtx3090": RTX_3090,
    "rtx4090": RTX_4090,
}
CPU = "cpu"


def find_hardware(text: str) -> Hardware:
    """What `--hardware` names: a data sheet of NAMED, `cpu` (measured, about two seconds), or a YAML file.

    Raises ConfigError.
    """
    name = text.lower()
    if name in NAMED:
        return NAMED[name]
    if name == CPU:
        return _this_machine()
    path = Path(text).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return read_hardware(path)
    hint = did_you_mean(name, [*NAMED, CPU], str)
    raise ConfigError(
        f"There is no hardware {short(text)}.{hint} Known are {', '.join(NAMED)}, cpu (this machine, "
        "measured), and files that end in .yaml."
    )


@functools.cache
def _this_machine() -> Hardware:
    """Measured once, so that all that a run compares is computed on the same machine."""
    from gqa_serve.workbench.machine import measure_machine

    return measure_machine()


def read_hardware(path: Path) -> Hardware:
    """Hardware described by a YAML file: the fields of `Hardware`, numbers per device.

    Raises ConfigError that names the field.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Could not read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold lines of `field: value`. For example:\n\n{EXAMPLE}")
    known = {field.name: field for field in dataclasses.fields(Hardware)}
    for name in raw:
        if name not in known:
            raise ConfigError(
                f"{path}: there is no field {short(name)}.{did_you_mean(str(name), known, str)} Fields are "
                f"{', '.join(known)}."
            )
    values: dict[str, Any] = {name: _field_value(path, name, value) for name, value in raw.items()}
    required = [field.name for field in known.values() if field.default is dataclasses.MISSING]
    missing = [name for name in required if values.get(name) is None and name != "fp8_flops"]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}. For example:\n\n{EXAMPLE}")
    return Hardware(**{"fp8_flops": None, **values})


EXAMPLE = """name: Two-socket server
memory_bytes: 512e9        # of one device
bandwidth: 400e9           # bytes/s that it reads from memory
float32_flops: 6e12        # dense, a multiply-add is two
bf16_flops: 100e12         # dense, of tensor cores or tiles; without any, as float32_flops
fp8_flops: 200e12          # leave out where there are no fp8 tensor cores
link_bandwidth: 64e9       # bytes/s, one direction; needed by --tensor-parallel alone
is_cpu: true               # served by the native CPU backend; default: false
int8_flops: 24e12          # CPUs: of integer weights; without, as bf16_flops"""


def _field_value(path: Path, name: str, value: object) -> str | float | bool | None:
    if name == "name":
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{path}: name must be a text; got {short(value)}.")
        return value
    if name == "is_cpu":
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: is_cpu must be true or false; got {short(value)}.")
        return value
    if value is None and name in ("fp8_flops", "link_bandwidth", "int8_flops"):
        return None
    if isinstance(value, str):  # YAML 1.1 reads 80e9, without a point and a sign, as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ConfigError(
            f"{path}: {name} must be a positive number of {_UNITS[name]}, such as 80e9; got {short(value)}."
        )
    return float(value)


_UNITS = {
    "memory_bytes": "bytes",
    "bandwidth": "bytes per second",
    "float32_flops": "operations per second",
    "bf16_flops": "operations per second",
    "fp8_flops": "operations per second",
    "link_bandwidth": "bytes per second",
    "int8_flops": "operations per second",
}
