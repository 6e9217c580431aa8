"""ModelRunner: load, measure, warm up, execute a plan.

Owns the model, its KV cache and the device they are on. Knows nothing of requests: `execute` takes ints
and gives hidden states. Everything that can be wrong with a checkpoint or too small in a machine is found
here, before the first request.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from gqa_serve.config import EngineConfig, omp_num_threads
from gqa_serve.engine.backends import BackendOptions, create_backend
from gqa_serve.engine.backends.base import Backend
from gqa_serve.engine.batch import PlanRow, StepPlan
from gqa_serve.engine.cpus import usable_cores
from gqa_serve.engine.distributed.group import RankGroup
from gqa_serve.engine.distributed.members import Members
from gqa_serve.engine.distributed.shard import Shard
from gqa_serve.engine.kv_cache import KVCache
from gqa_serve.engine.memory import cpu_kv_budget, format_bytes, free_machine_memory, gpu_kv_budget
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.loader import load_model
from gqa_serve.engine.placement import ALONE, Placement
from gqa_serve.engine.request import ModelInfo, SamplingParams, sampling_defaults
from gqa_serve.engine.sampler import SCORING_ROWS, PendingScores, RowOperations
from gqa_serve.engine.weights.checkpoint import Checkpoint, open_checkpoint
from gqa_serve.engine.weights.hub import demo_defaults
from gqa_serve.errors import CacheCapacityError, ConfigError, ModelError, RequestError

logger = logging.getLogger(__name__)

_QUANTIZED = ("int8", "int4", "fp8")

OnTensor = Callable[[int, int], None]
"""Called with (tensors loaded, tensors in all)."""


class ModelRunner:
    """A loaded model over its KV cache. `path` is a directory or .gguf file (see `resolve_model`), or an open
    checkpoint; `model_config` stands in for what its config.json says. `num_blocks` is what its KV cache had
    before a restart, which is kept if it fits: clients were told the longest context that follows from it.

    With a `group` this is one rank's part of the model; the runners of all ranks are made, and are told to
    execute and to compute logits, in the same order, and each gives what one runner of the whole would.
    """

    def __init__(
        self,
        path: Path | Checkpoint,
        config: EngineConfig,
        on_tensor: OnTensor | None = None,
        *,
        model_config: ModelConfig | None = None,
        placement: Placement = ALONE,
        group: RankGroup | None = None,
        num_blocks: int | None = None,
    ) -> None:
        self.placement = placement
        self.group = group
        self._had_blocks = num_blocks
        if config.tensor_parallel_size != (1 if group is None else group.size):
            raise ConfigError(
                "--tensor-parallel-size is for `gqa-serve serve`, `gqa-serve chat` and LLM; leave it out."
            )
        try:
            self._load(path, config, on_tensor, model_config)
        except torch.OutOfMemoryError as error:
            raise CacheCapacityError(
                "The GPU does not have the memory for this model and its largest step; use --quantization, "
                "or lower --max-num-batched-tokens, --max-num-seqs or --gpu-memory-utilization."
            ) from error

    def _load(
        self,
        path: Path | Checkpoint,
        config: EngineConfig,
        on_tensor: OnTensor | None,
        model_config: ModelConfig | None,
    ) -> None:
        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
        generation_config = demo_defaults(config.model) | checkpoint.generation_config
        try:
            sampling_defaults(generation_config)
        except RequestError as error:
            raise ModelError(f"generation_config.json recommends what cannot be used: {error}") from error
        self.config = model_config or ModelConfig.from_hf(checkpoint.raw_config, checkpoint.generation_config)
        if config.max_model_len is not None:
            self.config = self.config.with_max_model_len(config.max_model_len)
        self.device = choose_device(config.device, placement=self.placement)
        if self.device.type == "cuda" and self.device.index is not None:
            # Triton launches on the current device, whatever the tensors are on.
            torch.cuda.set_device(self.device)
        self.backend = _make_backend(config, self.config, self.device, self.placement)
        loaded = 0

        def count(_name: str) -> None:
            nonlocal loaded
            loaded += 1
            if on_tensor is not None:
                on_tensor(loaded, checkpoint.num_tensors)

        members = None
        if self.group is not None:
            members = Members(self.group, Shard(self.config, self.group.rank, self.group.size))
        self.model = load_model(
            checkpoint,
            self.config,
            device=self.device,
            backend=self.backend,
            on_tensor=count,
            members=members,
        )
        self._forward = self.backend.compile(self.model)
        self._give_back()  # parts of matrices that were joined
        self._warm_up(config)
        self._give_back()  # the throw-away cache
        num_blocks = min(self._of_all_ranks(self._num_blocks(config)))
        max_model_len = _fit_context(config, self.config.max_model_len, num_blocks * config.block_size)
        self.cache = self.backend.allocate_cache(self.model.config, num_blocks, config.block_size)
        with torch.inference_mode():
            self.backend.capture(self._forward, self.cache)
        block_bytes = self.backend.block_bytes(self.model.config, config.block_size)
        quantized = [name for name in self.model.weight_formats if name in _QUANTIZED]
        self.info = ModelInfo(
            model=config.model,
            architecture=self.config.architecture,
            vocab_size=self.config.vocab_size,
            max_model_len=max_model_len,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            num_blocks=num_blocks,
            block_size=config.block_size,
            kv_bytes_per_token=sum(self._of_all_ranks(block_bytes)) // config.block_size,
            kv_dtype=self.backend.kv_dtype,
            weight_bytes=sum(self._of_all_ranks(self.model.weight_bytes)),
            dtype=next(iter(self.model.weight_formats)),
            quantization="+".join(quantized) or "none",
            device=str(self.device),
            backend=self.backend.name,
            instruction_set=self.backend.instruction_set,
            max_num_seqs=config.max_num_seqs,
            max_waiting=config.max_waiting,
            generation_config=generation_config,
            hidden_size=self.config.hidden_size,
        )

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Tokens that end a sequence, from config.json and generation_config.json."""
        return self.config.eos_token_ids

    @property
    def row_operations(self) -> RowOperations | None:
        """The sampler's operations on logits, if the backend has its own."""
        return self.backend.row_operations()

    @property
    def lookahead(self) -> bool:
        """Whether `execute` and `logits` return before the device has computed."""
        return self.backend.lookahead

    @torch.inference_mode()
    def execute(self, plan: StepPlan, previous: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the plan's tokens, writing their K and V; hidden states [R, E] of its logit rows.

        `previous`: the tokens that the step before sampled, on the device, where rows continue from them.
        """
        return self._forward(plan, self.cache, previous)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, E] -> [R, V] float32, which the next call may overwrite."""
        logits: torch.Tensor = self.model.logits(hidden)
        return logits

    def _warm_up(self, config: EngineConfig) -> None:
        """One pass of the largest batch over a throw-away cache, so that thread pools, libraries and
        temporary tensors have taken their memory before the rest is measured. On a CPU a short pass does
        that."""
        on_cpu = self.device.type == "cpu"
        left = min(32, self.config.max_model_len) if on_cpu else config.max_num_batched_tokens
        rows, num_blocks = [], 0
        while left:
            tokens = min(left, self.config.max_model_len)
            blocks = -(-tokens // config.block_size)
            rows.append(PlanRow([0] * tokens, 0, list(range(num_blocks, num_blocks + blocks)), 1))
            num_blocks += blocks
            left -= tokens
        cache = self.backend.allocate_cache(self.model.config, num_blocks, config.block_size)
        with torch.inference_mode():
            hidden = self._forward(StepPlan(rows), cache)
            self.logits(hidden[:1].expand(1 if on_cpu else max(config.max_num_seqs, SCORING_ROWS), -1))
            if not on_cpu:
                self._compile_kernels(hidden, cache, config.max_num_seqs)

    def _compile_kernels(self, hidden: torch.Tensor, cache: KVCache, most: int) -> None:
        """Run what is compiled when it is first used, and differs by the number of rows or by parameters, so
        that no request waits for it: short prompts, decode steps, logits, draws with all kinds of filters."""
        for tokens in (20, 50):
            fits = min(tokens, cache.num_blocks * cache.block_size)
            blocks = list(range(-(-fits // cache.block_size)))
            self._forward(StepPlan([PlanRow([0] * fits, 0, blocks, 1)]), cache)
        for count in sorted({min(rows, most) for rows in (1, 32, 64, most)}):
            self._forward(StepPlan([PlanRow([0], 0, [0], 1)] * count), cache)
            logits = self.logits(hidden[:1].expand(count, -1))
            PendingScores(logits, torch.zeros(count, dtype=torch.int64, device=self.device), 1).result()
        operations = self.row_operations
        if operations is None:
            return
        logits = self.logits(hidden[:1].expand(most, -1))
        operations.argmax(logits)
        for top_k, top_p, min_p in itertools.product((0, 40), (1.0, 0.9), (0.0, 0.05)):
            params = [SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)] * most
            operations.draw(logits, range(most), params, [0.5] * most)

    def _of_all_ranks(self, number: int) -> list[int]:
        return [number] if self.group is None else self.group.gather_numbers(number)

    def _give_back(self) -> None:
        """Of a GPU's memory, what torch keeps though nothing uses it: it would count as used."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _num_blocks(self, config: EngineConfig) -> int:
        """KV blocks: those of before a restart, what --kv-cache-memory says, or else a share of free memory,
        at most what could be used."""
        size = self.backend.block_bytes(self.model.config, config.block_size)
        blocks_per_request = -(-self.config.max_model_len // config.block_size)
        free = free_memory(self.device)
        if self._had_blocks is not None and self._had_blocks * size <= free:
            return self._had_blocks
        asked = config.kv_cache_memory
        if asked is not None and asked > free:
            raise CacheCapacityError(
                f"--kv-cache-memory asks for {format_bytes(asked)}, but only {format_bytes(free)} are free."
            )
        if asked is not None:
            budget = asked
        elif self.device.type == "cpu":
            budget = cpu_kv_budget(free / self.placement.num_processes, blocks_per_request * size)
        else:
            total = total_memory(self.device)
            budget = gpu_kv_budget(total, total - free, config.gpu_memory_utilization)
        if budget < size:
            cure = "free memory or choose a smaller model" if asked is None else "raise --kv-cache-memory"
            if asked is None and self.device.type != "cpu":
                cure += ", raise --gpu-memory-utilization"
            raise CacheCapacityError(
                f"The KV cache fits 0 blocks: one block of {config.block_size} tokens takes "
                f"{format_bytes(size)}, there are {format_bytes(max(0, budget))}; {cure}, or lower "
                "--block-size."
            )
        useful = config.max_num_seqs * blocks_per_request
        return budget // size if asked is not None else min(budget // size, useful)


def _fit_context(config: EngineConfig, max_model_len: int, kv_tokens: int) -> int:
    """The longest prompt + output: what was asked for, else the model's own or what the KV cache holds."""
    if min(max_model_len, kv_tokens) < 2:
        raise CacheCapacityError(
            "A context of 1 token leaves no room to generate; raise --kv-cache-memory or --max-model-len."
        )
    if max_model_len <= kv_tokens:
        return max_model_len
    if config.max_model_len is not None:
        raise CacheCapacityError(
            f"--max-model-len {max_model_len} does not fit the KV cache, which holds {kv_tokens} tokens; "
            "lower it or raise --kv-cache-memory."
        )
    logger.warning(
        "The KV cache holds %d tokens, so requests are limited to that (the model allows %d); "
        "--kv-cache-memory raises it.",
        kv_tokens,
        max_model_len,
    )
    return kv_tokens


def choose_device(name: str, *, placement: Placement = ALONE) -> torch.device:
    """The torch device for --device, each process's own GPU. Raises ConfigError if this machine lacks it."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        have = ", ".join(kind for kind, ok in available.items() if ok)
        raise ConfigError(f"--device {name} is not available here (available: {have}).")
    if placement.num_processes == 1 or name == "cpu":
        return torch.device(name)
    gpus = torch.cuda.device_count() if name == "cuda" else 1
    if placement.num_processes > gpus:
        raise ConfigError(
            f"--data-parallel-size {placement.num_replicas} times --tensor-parallel-size "
            f"{placement.num_ranks} needs {placement.num_processes} GPUs, one each; there are {gpus}."
        )
    return torch.device(name, placement.index)


def _make_backend(
    config: EngineConfig, model: ModelConfig, device: torch.device, placement: Placement
) -> Backend:
    """The backend that `config` asks for, after setting how many threads torch and it compute with."""
    if device.type != "cuda" and config.gpu_memory_utilization != EngineConfig().gpu_memory_utilization:
        raise ConfigError(
            f"--gpu-memory-utilization is for CUDA, not for {device.type}; use --kv-cache-memory."
        )
    threads = config.threads or omp_num_threads() or placement.share(usable_cores())
    if device.type == "cpu" or config.threads is not None:
        torch.set_num_threads(threads)
    options = BackendOptions(
        backend=config.backend,
        dtype=config.dtype,
        checkpoint_dtype=model.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        threads=threads,
        cpu_isa=config.cpu_isa,
        deterministic=config.deterministic,
        attention_backend=config.attention_backend,
        enforce_eager=config.enforce_eager,
        max_num_seqs=config.max_num_seqs,
    )
    backend = create_backend(device, options)
    if config.block_size % backend.block_multiple:
        raise ConfigError(
            f"--block-size {config.block_size} is not a multiple of {backend.block_multiple}, which the "
            f"{backend.name} backend needs; use {backend.block_multiple} or --backend reference."
        )
    return backend


def total_memory(device: torch.device) -> int:
    """Bytes that `device` has. What is not a GPU of its own shares the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def free_memory(device: torch.device) -> int:
    """Bytes free on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_machine_memory()
