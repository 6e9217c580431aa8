"""Every setting, once: a dataclass field is a flag, an environment variable, a YAML line and its help.

`EngineConfig` is what the engine (and `LLM`) takes, `ServerConfig` what the HTTP server adds, `ChatConfig`
what `gqa-serve chat` does. A field's name gives `--max-model-len`, `GQA_SERVE_MAX_MODEL_LEN` and
`max-model-len:` (or `max_model_len:`) in the file named by `--config`. Flags win over the environment, that
wins over the file, that over the default; `settings.py` is the mechanism. This module is the only one that
reads the environment (the hub's own HF_* variables are read by its library). No torch here.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gqa_serve.errors import ConfigError
from gqa_serve.settings import check, parse_size, read_settings, setting, short

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*]+")
_HOST_NAME = re.compile(r"\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of the engine. Raises ConfigError if a value is out of range."""

    model: str = setting("", "hub id, directory, .gguf file, or 'demo'", "model")
    revision: str | None = setting(None, "branch, tag or commit on the hub", "model")
    download_dir: str | None = setting(None, "where hub files are cached", "model", metavar="DIR")
    offline: bool = setting(False, "use only files already downloaded", "model")
    dtype: str = setting(
        "auto",
        "precision of weights that are not quantized; auto: as stored, float32 with the reference on a CPU",
        "model",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = setting(
        "auto",
        "int8, int4, fp8 (GPU): quantize at load; none: dequantize exactly; auto: quantized weights stay so",
        "model",
        choices=("auto", "none", "int8", "int4", "fp8"),
    )
    device: str = setting("auto", "where to run", "model", choices=("auto", "cpu", "cuda", "mps"))
    backend: str = setting(
        "auto",
        "what computes; auto: native kernels on a CPU, Triton's on CUDA, plain torch where these cannot run",
        "model",
        choices=("auto", "native", "cuda", "reference"),
    )
    threads: int | None = setting(
        None,
        "threads that compute on a CPU; default: OMP_NUM_THREADS, else the physical cores it may use",
        "model",
        low=1,
        high=1024,
    )
    cpu_isa: str = setting(
        "auto",
        "instruction set of the native kernels; auto: the best this CPU has",
        "model",
        choices=("auto", "avx2", "avx512", "amx", "neon"),
    )
    tensor_parallel_size: int = setting(
        1,
        "processes, on CUDA each with a GPU of its own, that hold a part of the model each",
        "model",
        low=1,
        high=1024,
        metavar="N",
    )
    deterministic: bool = setting(
        False,
        "same request, same bytes, whatever the load, on CUDA too (slower there); on a CPU it always holds",
        "model",
    )
    attention_backend: str = setting(
        "triton",
        "CUDA: whose attention; triton: ours; others where installed, without graphs and quantized caches",
        "model",
        choices=("triton", "flashinfer", "flash-attn"),
    )
    enforce_eager: bool = setting(
        False, "CUDA: compute decode steps kernel by kernel instead of replaying captured graphs", "model"
    )
    seed: int | None = setting(
        None, "seed of requests that bring none; default: a new one each start", "model"
    )
    max_model_len: int | None = setting(
        None,
        "longest prompt + output, in tokens; default: the model's, or what the KV cache holds",
        "memory",
        low=1,
    )
    max_num_seqs: int = setting(128, "most requests computed at once", "memory", low=1)
    max_num_batched_tokens: int = setting(2048, "most tokens computed in one step", "memory", low=1)
    max_waiting: int = setting(
        1024, "most requests queued beyond those running; more get a 429", "limits", low=0
    )
    max_waiting_tokens: int = setting(2_000_000, "most prompt tokens queued; more get a 429", "limits", low=1)
    queue_timeout: float | None = setting(
        None, "seconds a request may be queued, then it gets a 503", "limits", low=0.001, metavar="S"
    )
    engine_timeout: float = setting(
        300.0,
        "seconds a busy engine may be silent, then it is restarted; 0: no limit",
        "limits",
        low=0,
        metavar="S",
    )
    block_size: int = setting(
        16, "tokens per KV block; native backend: a multiple of 16", "memory", low=1, high=1024
    )
    kv_cache_dtype: str = setting(
        "auto",
        "precision of K and V; auto: bfloat16 if the checkpoint is, else float32; reference: as its weights",
        "memory",
        choices=("auto", "float32", "bfloat16", "float16", "int8", "fp8"),
    )
    kv_cache_memory: int | None = setting(
        None,
        "memory for the KV cache (of each tensor-parallel rank), e.g. 2GiB; default: measured",
        "memory",
        parse=parse_size,
        metavar="SIZE",
    )
    gpu_memory_utilization: float = setting(
        0.9,
        "CUDA: share of the GPU's memory for weights, KV cache and all, where --kv-cache-memory does not say",
        "memory",
        low=0.05,
        high=1.0,
        metavar="SHARE",
    )
    prefix_caching: bool = setting(True, "reuse KV blocks of equal prompt beginnings", "memory")

    def __post_init__(self) -> None:
        check(self)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least --max-num-seqs "
                f"({self.max_num_seqs}), so that each running request can advance in every step."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP server around the engine."""

    host: str = setting("127.0.0.1", "address to listen on", "server")
    port: int = setting(8000, "port to listen on; 0 picks a free one", "server", low=0, high=65535)
    data_parallel_size: int = setting(
        1,
        "engines behind this server, each with the whole model; requests are spread over them",
        "server",
        low=1,
    )
    served_model_name: tuple[str, ...] = setting(
        (), "name(s) clients use; default: the value of --model", "server", metavar="NAME"
    )
    chat_template: str | None = setting(
        None,
        "Jinja file or text, or chatml, llama3, gemma, mistral, phi3; default: the checkpoint's",
        "server",
    )
    api_key: tuple[str, ...] = setting(
        (),
        "key(s) that clients must send; better in GQA_SERVE_API_KEY or --api-key-file: `ps` shows flags",
        "server",
        metavar="KEY",
        secret=True,
    )
    api_key_file: str | None = setting(
        None, "file of such keys, one a line, # begins a comment", "server", metavar="FILE"
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        "web pages that may call from a browser, e.g. https://chat.example.org; *: all; default: none",
        "server",
        metavar="ORIGIN",
    )
    root_path: str = setting(
        "", "path prefix under which a proxy shows this server, e.g. /llm", "server", metavar="PATH"
    )
    pooling: str = setting(
        "last",
        "/v1/embeddings: the hidden state of the last token, or the mean of all, where a request is silent",
        "server",
        choices=("last", "mean"),
    )
    tool_call_parser: str = setting(
        "auto",
        "how the model spells tool calls; auto: as its chat template does; none: refuse tools",
        "server",
        choices=("auto", "hermes", "llama3", "mistral", "none"),
    )
    reasoning_parser: str = setting(
        "auto",
        "think: tell <think>...</think> apart from answers; auto: where the chat template has it",
        "server",
        choices=("auto", "think", "none"),
    )
    max_body_bytes: int = setting(
        16 * 2**20, "largest request body, e.g. 16MiB", "limits", parse=parse_size, metavar="SIZE", low=1024
    )
    drain_timeout: float = setting(
        30.0, "seconds that running requests get to finish on shutdown", "server", low=0, metavar="S"
    )
    request_timeout: float | None = setting(
        None, "seconds a request may take, then it ends with an error", "limits", low=0.001, metavar="S"
    )
    read_timeout: float = setting(
        30.0, "seconds to send a head, or a body beyond 16 KiB/s; 0: no limit", "limits", low=0, metavar="S"
    )
    send_timeout: float = setting(
        60.0, "seconds a client may read nothing, then it is dropped", "limits", low=0.1, metavar="S"
    )
    max_connections: int = setting(4096, "most connections open at once; more get a 503", "limits", low=1)
    key_max_requests: int | None = setting(
        None, "most requests of an API key at once; more get a 429", "limits", low=1
    )
    key_tokens_per_minute: int | None = setting(
        None,
        "most tokens, prompt and output, of an API key in a minute; more get a 429",
        "limits",
        low=1,
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "names of this server in the Host header, e.g. *.example.org; default: all, on a loopback address "
        "without API keys only localhost",
        "server",
        metavar="HOST",
    )
    ui: bool = setting(True, "the page at /: a chat and a dashboard", "server")
    open_metrics: bool = setting(False, "GET /metrics without an API key", "observability")
    otlp_endpoint: str | None = setting(
        None,
        "where to send OpenTelemetry traces, e.g. http://127.0.0.1:4318",
        "observability",
        metavar="URL",
    )
    log_format: str = setting("text", "json: one object a line", "observability", choices=("text", "json"))
    log_prompts: bool = setting(
        False, "log prompts and answers too, which are your users' words", "observability"
    )
    max_stored_responses: int = setting(
        1000, "responses of /v1/responses kept in memory for later requests; 0: none", "server", low=0
    )
    log_level: str = setting(
        "info", "how much to log", "observability", choices=("debug", "info", "warning", "error", "critical")
    )

    def __post_init__(self) -> None:
        check(self)
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origins must be * or origins such as https://chat.example.org, without a path; "
                    f"got {short(origin)}."
                )
        for name in self.allowed_hosts:
            if not _HOST_NAME.fullmatch(name):
                raise ConfigError(
                    f"--allowed-hosts must be *, or names such as llm.example.org and *.example.org, without "
                    f"a port; got {short(name)}."
                )
        if self.root_path and not _ROOT_PATH.fullmatch(self.root_path):
            raise ConfigError(
                f"--root-path must look like /llm, without a slash at its end; got {short(self.root_path)}."
            )
        if (self.key_max_requests or self.key_tokens_per_minute) and not (self.api_key or self.api_key_file):
            name = "--key-max-requests" if self.key_max_requests else "--key-tokens-per-minute"
            raise ConfigError(
                f"{name} is for each API key, but there are none: set --api-key-file (or "
                "GQA_SERVE_API_KEY), or leave it out."
            )
        if self.root_path.split("/")[1:2] == ["v1"]:  # nobody could tell what a proxy stripped
            raise ConfigError("--root-path must not begin with /v1, as the routes do.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Settings of `gqa-serve chat --model` beside the engine's; those of the server under their names."""

    chat_template: str | None = setting(
        None,
        "Jinja file or text, or chatml, llama3, gemma, mistral, phi3; default: the checkpoint's",
        "model",
    )
    log_level: str = setting(
        "warning", "how much to log", "chat", choices=("debug", "info", "warning", "error", "critical")
    )

    def __post_init__(self) -> None:
        check(self)


def collect(
    configs: Sequence[type], flags: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> list[Any]:
    """One instance per class of `configs`, from flags, environment, file and defaults (`read_settings`)."""
    environ = os.environ if environ is None else environ
    return read_settings(configs, flags, environ, (EngineConfig, ServerConfig, ChatConfig))


def openai_api_key(environ: Mapping[str, str] | None = None) -> str | None:
    """What OpenAI's clients read from OPENAI_API_KEY; empty is unset."""
    return (os.environ if environ is None else environ).get("OPENAI_API_KEY") or None


def omp_num_threads(environ: Mapping[str, str] | None = None) -> int | None:
    """What OMP_NUM_THREADS asks for at the outer level; None if it is unset or says nothing OpenMP reads."""
    text = (os.environ if environ is None else environ).get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) > 0 else None


def has_c_compiler(environ: Mapping[str, str] | None = None) -> bool:
    """Whether Triton will find one: CC, else gcc or clang on the path."""
    named = (os.environ if environ is None else environ).get("CC")
    return bool(named) or any(shutil.which(name) for name in ("gcc", "clang"))


def engine_environment() -> dict[str, str]:
    """The environment of the engine process: ours, a short spin for waiting threads, a silent profiler.

    Their default spin (libgomp's) loses several times the throughput as soon as another process, the API
    process for one, needs one of the cores.
    """
    environ = dict(os.environ)
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "1000")
    environ.setdefault("KINETO_LOG_LEVEL", "99")  # a profile would write lines of its own into the log
    return environ


def adopt_loopback() -> None:
    """Let tensor-parallel ranks, which are all on this machine, reach each other by loopback and only so."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)


def adopt_engine_environment() -> None:
    """Make that the environment of this process, which is to compute itself; before torch is imported."""
    os.environ.update(engine_environment())
