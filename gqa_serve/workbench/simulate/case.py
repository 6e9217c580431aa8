"""One thing to simulate: a model on replicas of some hardware with some settings, from flags.

Owns the flags that describe it, their meaning, and what is refused. Settings of the engine have the server's
names, and come from GQA_SERVE_* and --config too; memory and formats are `plan`'s account. Imports no torch.
Invariant: a Case holds nothing that is not used.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from gqa_serve.config import EngineConfig, collect
from gqa_serve.engine.memory import format_bytes
from gqa_serve.errors import ConfigError
from gqa_serve.settings import add_flags, flag_of
from gqa_serve.workbench.hardware import NAMED, Hardware, find_hardware
from gqa_serve.workbench.model_source import ModelSource, read_model
from gqa_serve.workbench.plan.capacity import Capacity, MemorySettings, capacity
from gqa_serve.workbench.plan.serving_formats import served_formats, served_kv_dtype
from gqa_serve.workbench.simulate.cost_model import CostModel
from gqa_serve.workbench.simulate.fitted import read_cost_model
from gqa_serve.workbench.simulate.roofline import Roofline
from gqa_serve.workbench.simulate.routing import POLICIES
from gqa_serve.workbench.simulate.twin import ReplicaSpec

_HONOURED = (
    "model", "revision", "offline", "quantization", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
    "max_waiting", "max_waiting_tokens", "block_size", "kv_cache_dtype", "kv_cache_memory",
    "gpu_memory_utilization", "prefix_caching",
)  # fmt: skip


def _honoured() -> type:
    """The fields of EngineConfig that change what is simulated."""
    fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
    chosen = []
    for name in _HONOURED:
        field = fields[name]
        metadata = field.metadata
        chosen.append((name, field.type, dataclasses.field(default=field.default, metadata=metadata)))
    return dataclasses.make_dataclass("SimulatedEngine", chosen, frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`devices` in all; `price` of one per hour. `kv_bytes`: memory of one rank's cache, None if unknown."""

    label: str
    source: ModelSource
    num_kv_heads: int
    devices: int
    device_name: str
    spec: ReplicaSpec
    cost: CostModel
    replicas: int
    routing: str
    concurrency: int | None
    price: float | None
    kv_bytes: int | None


def add_case_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `make_case`."""
    add_flags(parser, _honoured())
    group = parser.add_argument_group("hardware and fleet")
    add = group.add_argument
    add(
        "--hardware",
        default="h100",
        metavar="NAME",
        help=f"{', '.join(NAMED)}, cpu (this machine, measured), or a .yaml file; default h100",
    )
    add("--tensor-parallel", type=int, default=1, metavar="N", help="devices per replica; default 1")
    add("--replicas", type=int, default=1, metavar="N", help="engines behind the router; default 1")
    add("--routing", choices=POLICIES, default="least-loaded", help="how they share (default least-loaded)")
    add(
        "--num-kv-heads",
        type=_whole_numbers,
        metavar="N",
        help="the model with so many KV heads; 32,8,1 compares MHA, GQA and MQA",
    )
    add("--num-blocks", type=int, metavar="N", help="KV blocks of a replica, instead of counting memory")
    add("--price", type=float, metavar="P", help="price of a device per hour, for cost per million tokens")
    add(
        "--concurrency",
        type=int,
        metavar="N",
        help="keep N requests under way instead of sending them at their times",
    )
    group = parser.add_argument_group("time of a step")
    add = group.add_argument
    add(
        "--efficiency",
        type=float,
        metavar="SHARE",
        help="of the roofline that kernels reach; default 1, which no kernel does",
    )
    add(
        "--step-overhead",
        type=float,
        metavar="MS",
        help="milliseconds that each step takes besides; default 0",
    )
    add("--cost-model", type=Path, metavar="FILE", help="times fitted to measurements, by --save-cost-model")


def make_case(args: argparse.Namespace, label: str, cost: CostModel | None = None) -> Case:
    """What the flags describe; `cost` in place of --cost-model. Raises ConfigError, ModelError, HubError."""
    flags = {name: value for name, value in vars(args).items() if name in _HONOURED or name == "config"}
    (engine,) = collect([EngineConfig], flags)
    if not engine.model:
        raise ConfigError(
            "Which model? Give --model a hub id, a directory, a .gguf file, a config.json, or 'demo'."
        )
    if engine.queue_timeout is not None:
        raise ConfigError("--queue-timeout is not simulated: leave it out of the environment and --config.")
    _check(args)
    if cost is None and args.cost_model is not None:
        cost = read_cost_model(args.cost_model)
    source = read_model(engine.model, revision=engine.revision, offline=engine.offline)
    config = source.config if args.num_kv_heads is None else source.with_kv_heads(args.num_kv_heads)
    if engine.max_model_len is not None:
        config = config.with_max_model_len(engine.max_model_len)
    source = dataclasses.replace(source, config=config)
    if cost is not None and (args.efficiency is not None or args.step_overhead is not None):
        raise ConfigError(
            "--efficiency and --step-overhead are for the roofline; a fitted cost model has its own."
        )
    hardware = find_hardware(args.hardware)
    spec, roofline, kv_bytes = _replica(args, source, hardware, engine)
    return Case(
        label=label,
        source=source,
        num_kv_heads=config.num_kv_heads,
        devices=args.tensor_parallel * args.replicas,
        device_name=hardware.name,
        spec=spec,
        cost=cost or roofline,
        replicas=args.replicas,
        routing=args.routing,
        concurrency=args.concurrency,
        price=args.price,
        kv_bytes=kv_bytes,
    )


def _replica(
    args: argparse.Namespace, source: ModelSource, hardware: Hardware, engine: EngineConfig
) -> tuple[ReplicaSpec, Roofline, int | None]:
    """A replica's settings, the roofline of its steps, and the bytes of its cache on one device."""
    ranks, config = args.tensor_parallel, source.config
    kv_dtype = served_kv_dtype(source, hardware, engine.quantization, engine.kv_cache_dtype)
    formats = served_formats(source, hardware, engine.quantization, kv_dtype, engine.block_size)
    if hardware.is_cpu and engine.gpu_memory_utilization != EngineConfig().gpu_memory_utilization:
        raise ConfigError("--gpu-memory-utilization is for GPUs; use --kv-cache-memory for a CPU's KV cache.")
    held = capacity(
        config,
        ranks,
        formats,
        hardware,
        MemorySettings(
            utilization=engine.gpu_memory_utilization,
            kv_cache_memory=engine.kv_cache_memory,
            block_size=engine.block_size,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_num_seqs=engine.max_num_seqs,
        ),
    )
    num_blocks = _num_blocks(args, source, hardware, engine, held)
    spec = ReplicaSpec(
        num_blocks=num_blocks,
        block_size=engine.block_size,
        max_model_len=min(config.max_model_len, num_blocks * engine.block_size),
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_waiting=engine.max_waiting,
        max_waiting_tokens=engine.max_waiting_tokens,
        prefix_caching=engine.prefix_caching,
        lookahead=not hardware.is_cpu,
    )
    roofline = Roofline(
        config,
        hardware,
        formats,
        ranks=ranks,
        post_norms=source.post_norms,
        efficiency=1.0 if args.efficiency is None else args.efficiency,
        overhead_s=(args.step_overhead or 0.0) / 1e3,
    )
    return spec, roofline, num_blocks * held.block_bytes


def _num_blocks(
    args: argparse.Namespace, source: ModelSource, hardware: Hardware, engine: EngineConfig, held: Capacity
) -> int:
    """KV blocks of a replica, as the engine counts them; refuses what it refuses."""
    asked, config = engine.kv_cache_memory, source.config
    if asked is not None and args.num_blocks is not None:
        raise ConfigError("--kv-cache-memory and --num-blocks both say how large the cache is; give one.")
    if asked is not None and asked > held.kv_budget_bytes:
        raise ConfigError(
            f"--kv-cache-memory asks for {format_bytes(asked)}, but {hardware.name} has only "
            f"{format_bytes(max(0, held.kv_budget_bytes))} beside weights and activations; lower it."
        )
    num_blocks = held.num_blocks
    if asked is None:  # as the engine: no more than all requests together could use
        num_blocks = min(num_blocks, engine.max_num_seqs * -(-config.max_model_len // engine.block_size))
    if args.num_blocks is not None:
        num_blocks = args.num_blocks
    if num_blocks * engine.block_size < 2:
        raise ConfigError(
            f"The KV cache fits 0 blocks: {source.name} takes {held.weight_bytes / 2**30:.1f} GiB of the "
            f"{hardware.memory_bytes / 2**30:.1f} GiB of each device; use --tensor-parallel, --quantization, "
            "or a device with more memory."
        )
    if engine.max_model_len is not None and engine.max_model_len > num_blocks * engine.block_size:
        raise ConfigError(
            f"--max-model-len {engine.max_model_len} does not fit the KV cache, which holds "
            f"{num_blocks * engine.block_size} tokens, so that the server would not start; lower it."
        )
    return num_blocks


def _check(args: argparse.Namespace) -> None:
    for name in ("tensor_parallel", "replicas", "num_blocks", "concurrency"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"{flag_of(name)} must be 1 or more; got {value}.")
    if args.efficiency is not None and not 0 < args.efficiency <= 1:
        raise ConfigError(f"--efficiency must be a share above 0 and up to 1; got {args.efficiency}.")
    if args.step_overhead is not None and not 0 <= args.step_overhead < float("inf"):
        raise ConfigError(f"--step-overhead must be milliseconds from 0 on; got {args.step_overhead}.")
    if args.price is not None and not 0 < args.price < float("inf"):
        raise ConfigError(f"--price must be more than 0; got {args.price}.")


def _whole_numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers from 1 on, such as 32,8,1; got {text!r}")
    return list(dict.fromkeys(numbers))
