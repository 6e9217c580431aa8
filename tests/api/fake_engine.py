"""A scripted AsyncEngine, a byte-level tokenizer with no merges, and a server around them on loopback.

Token ids 0..255 are the bytes; then come the special tokens. Tests say what each request answers and read
back which requests came, ended and were aborted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import httpx2
import numpy as np
import tokenizers
import uvicorn
from tokenizers import decoders, pre_tokenizers

from gqa_serve.api.app import create_app
from gqa_serve.api.connection_limits import SEND_BUFFER_BYTES, ConnectionLimits
from gqa_serve.api.http_protocol import http_protocol
from gqa_serve.config import ServerConfig
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.engine.metrics import EngineSnapshot, StepStats
from gqa_serve.engine.request import EngineRequest, FinishReason, ModelInfo, TokenLogprobs, TokenOutput
from gqa_serve.engine.token_pieces import byte_alphabet
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.engine.wire import Profiled
from gqa_serve.errors import EngineUnavailableError, QueueFullError

MODEL = "fake/model"
PATIENCE_S = 90.0  # for what takes no time to speak of where nothing else is computed
IM_START, IM_END = 256, 257
VOCAB_SIZE = 258
MAX_MODEL_LEN = 512
HIDDEN_SIZE = 4
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if not (loop.last and continue_final_message) %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def fake_tokenizer(*more: str) -> Tokenizer:
    """Bytes 0..255 are ids 0..255; `more` special tokens come last."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", *more])
    return Tokenizer(backend, special_tokens={"eos_token": "<|im_end|>"})


def fake_info(**changes: object) -> ModelInfo:
    values: dict[str, object] = {
        "model": MODEL,
        "architecture": "FakeForCausalLM",
        "vocab_size": VOCAB_SIZE,
        "max_model_len": MAX_MODEL_LEN,
        "num_heads": 8,
        "num_kv_heads": 2,
        "num_blocks": 64,
        "block_size": 16,
        "kv_bytes_per_token": 64,
        "kv_dtype": "float32",
        "weight_bytes": 1024,
        "dtype": "float32",
        "quantization": "none",
        "device": "cpu",
        "backend": "reference",
        "max_num_seqs": 8,
        "max_waiting": 1016,
        "hidden_size": HIDDEN_SIZE,
    }
    return ModelInfo(**{**values, **changes})  # type: ignore[arg-type]


@dataclasses.dataclass
class Script:
    """What one request answers: pieces of token ids (or text), one engine step each, then an end.

    `hold_at` stops before that piece until `FakeEngine.release` is set; `finish` None means "stop" with the
    end-of-sequence token, unless max_tokens comes first. `fault` is raised by the stream before the end.
    """

    pieces: list[str | bytes | list[int]] = dataclasses.field(default_factory=lambda: ["Hel", "lo", " world"])
    finish: FinishReason | None = None
    error: str | None = None
    hold_at: int | None = None
    num_cached_tokens: int = 0
    fault: Exception | None = None
    queue_s: float | None = None


class FakeStream:
    """A TokenStream that plays a script."""

    def __init__(self, engine: FakeEngine, request: EngineRequest, script: Script) -> None:
        self.request = request
        self._engine = engine
        self._outputs = engine.outputs(request, script)
        self._script = script
        self._next = 0
        self.aborts = 0
        self.end: str | None = None

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> TokenOutput:
        await asyncio.sleep(0)
        if self._script.hold_at == self._next:
            while not self._engine.release.is_set() and self.end is None:
                await asyncio.sleep(0.002)
        if self.end is not None:
            raise StopAsyncIteration
        if self._next == len(self._outputs):
            self._finish("fault")
            raise self._script.fault or RuntimeError("the script has no end")
        output = self._outputs[self._next]
        self._next += 1
        if output.finish_reason is not None:
            self._finish(output.finish_reason)
        return output

    def _finish(self, how: str) -> None:
        if self.end is None:
            self.end = how

    def abort(self) -> None:
        self.aborts += 1
        self._finish("abort")


class FakeEngine:
    """Records every request; `script` says what each answers."""

    def __init__(self, script: Callable[[EngineRequest], Script] | None = None) -> None:
        self.on_step: Callable[[StepStats], None] = lambda stats: None
        self.reset(script)

    def reset(self, script: Callable[[EngineRequest], Script] | None = None) -> None:
        """As new, for the next test."""
        self.state = "ready"
        self.model_info: ModelInfo | None = fake_info()
        self.script = script or (lambda request: Script())
        self.streams: list[FakeStream] = []
        self.release = threading.Event()
        self.capacity: int | None = None
        self.picture = EngineSnapshot(bytes(64), [])
        self.num_restarts = 0
        self.profiles: list[object] = []
        self.profiled: Profiled | None = None
        self.pid: int | None = None

    async def profile(self, num_steps: int, timeout_s: float) -> Profiled:
        self.profiles.append((num_steps, timeout_s))
        try:
            while self.profiled is None:
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.profiles.append("cancelled")
            raise
        return self.profiled

    async def snapshot(self) -> EngineSnapshot:
        if self.state != "ready":
            raise EngineUnavailableError(f"The engine is {self.state}.")
        return self.picture

    def check_room(self) -> None:
        if self.state == "ready" and self.capacity is not None and self.num_running >= self.capacity:
            raise QueueFullError("The queue is full.", retry_after_s=3)

    def submit_all(self, requests: Sequence[EngineRequest]) -> list[FakeStream]:
        if self.capacity is not None and self.num_running + len(requests) > self.capacity:
            raise QueueFullError("The queue is full.", retry_after_s=3)
        return [self.submit(request) for request in requests]

    def submit(self, request: EngineRequest) -> FakeStream:
        if self.state != "ready":
            raise EngineUnavailableError(f"The engine is {self.state}.")
        stream = FakeStream(self, request, self.script(request))
        self.streams.append(stream)
        return stream

    @property
    def requests(self) -> list[EngineRequest]:
        return [stream.request for stream in self.streams]

    @property
    def num_running(self) -> int:
        return sum(stream.end is None for stream in self.streams)

    @property
    def num_requests(self) -> int:
        return self.num_running

    @property
    def replicas(self) -> list[FakeEngine]:
        return [self]

    def ends(self) -> list[str | None]:
        return [stream.end for stream in self.streams]

    def outputs(self, request: EngineRequest, script: Script) -> list[TokenOutput]:
        params = request.params
        if params.max_tokens is None:
            raise AssertionError("the API must resolve max_tokens")
        if request.pooling is not None:
            assert params.max_tokens == 0
            ids = request.prompt
            vector = {"last": [ids[-1], 1, 0, -2], "mean": [sum(ids) / len(ids), 0, 0, 0]}[request.pooling]
            output = TokenOutput(request_id=request.request_id, pooled=np.array(vector, "<f4").tobytes())
            output.finish_reason, output.error = script.finish or "length", script.error
            return [output]
        steps = [self._ids(piece) for piece in script.pieces]
        ends_itself = script.finish is None and script.fault is None
        if ends_itself:
            steps.append([IM_END])
        outputs: list[TokenOutput] = []
        left = params.max_tokens
        for ids in steps:
            taken = ids[:left]
            left -= len(taken)
            outputs.append(self._output(request, taken, first=not outputs))
            if ids == [IM_END] and taken:
                outputs[-1].finish_reason, outputs[-1].stop_token_id = "stop", IM_END
            elif left == 0 and (ends_itself or script.finish == "length"):
                outputs[-1].finish_reason = "length"
            if outputs[-1].finish_reason:
                break
        if outputs and script.num_cached_tokens:
            outputs[0].num_cached_tokens = script.num_cached_tokens
        if outputs:
            outputs[0].queue_s = script.queue_s
        if script.finish is not None and not (outputs and outputs[-1].finish_reason):
            outputs.append(
                TokenOutput(request_id=request.request_id, finish_reason=script.finish, error=script.error)
            )
        return outputs

    @staticmethod
    def _ids(piece: str | bytes | list[int]) -> list[int]:
        return list(piece.encode() if isinstance(piece, str) else piece)

    @staticmethod
    def _output(request: EngineRequest, ids: list[int], first: bool) -> TokenOutput:
        params = request.params
        output = TokenOutput(request_id=request.request_id, token_ids=ids)
        if params.logprobs is not None:
            output.logprobs = [fake_logprobs(token, params.logprobs) for token in ids]
        if params.prompt_logprobs is not None and first:
            known = [fake_logprobs(token, params.prompt_logprobs) for token in request.prompt[1:]]
            output.prompt_logprobs = [None, *known]
        return output


class FakeReplicas(FakeEngine):
    """Three engines; the first computes everything."""

    def __init__(self) -> None:
        self.engines = [FakeEngine() for _ in range(3)]
        super().__init__()

    @property
    def replicas(self) -> list[FakeEngine]:
        return self.engines

    @property
    def model_info(self) -> ModelInfo | None:  # type: ignore[override]
        return self.engines[0].model_info

    @model_info.setter
    def model_info(self, info: ModelInfo | None) -> None:
        self.engines[0].model_info = info

    def submit_all(self, requests: Sequence[EngineRequest]) -> list[FakeStream]:
        return self.engines[0].submit_all(requests)


def fake_logprobs(token: int, num_top: int) -> TokenLogprobs:
    """The token at -0.5, then the following ids, the last alternative impossible."""
    top = [(token, -0.5)] + [((token + n) % 256, -1.0 - n) for n in range(1, 20)]
    top = top[:num_top]
    if num_top > 1:
        top[-1] = (top[-1][0], float("-inf"))
    return TokenLogprobs(token, -0.5, 1, top)


@dataclasses.dataclass
class Server:
    """A running server: where it is, and the engine behind it."""

    engine: FakeEngine
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def post(self, path: str, body: object) -> httpx2.Response:
        """POST as JSON. (Not verifying, which plain HTTP has no use for, saves reading the certificates.)"""
        return httpx2.post(self.url + path, json=body, verify=False)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=PATIENCE_S)


@contextmanager
def serving(
    engine: FakeEngine,
    *,
    template: str = TEMPLATE,
    specials: tuple[str, ...] = (),
    tokenizer: Tokenizer | None = None,
    **settings: object,
) -> Iterator[Server]:
    """Run the real application in uvicorn in a thread, on a free port."""
    tokenizer = tokenizer or fake_tokenizer(*specials)
    defaults = {"served_model_name": (MODEL, "alias"), "allowed_hosts": ("test",)}  # as raw requests call it
    config = ServerConfig(**{**defaults, **settings})  # type: ignore[arg-type]
    limits = ConnectionLimits(config.read_timeout, config.send_timeout, config.max_connections)
    app = create_app(engine, tokenizer, ChatTemplate(template), config, limits=limits)  # type: ignore[arg-type]
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            ws="none",
            lifespan="off",
            http=http_protocol(limits),
            timeout_graceful_shutdown=5,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Server(engine, *listener.getsockname()[:2])
    finally:
        engine.release.set()
        server.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()
        if thread.is_alive():
            raise RuntimeError("the server did not stop")


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Returns when `condition` holds; fails the test if it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the expected state never came")
        time.sleep(0.005)
