"""What a request is, and what comes back: `SamplingParams`, `EngineRequest`, `TokenOutput`.

These are the messages between the API process and the engine process (msgspec structs, packed as
msgpack) and the arguments of the offline `LLM`. They hold token ids and numbers; the only text is
`SamplingParams.stop`, which the engine carries but never reads (`detokenizer.py` does).
No torch here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from gqa_serve.engine.pooling import Pool
from gqa_serve.errors import ContextLengthError, RequestError

if TYPE_CHECKING:
    from gqa_serve.engine.constraints import Constraint

FinishReason = Literal["stop", "length", "abort", "error"]
Pooling = Literal["last", "mean"]

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_CHARS = 256 * 1024
MAX_ALLOWED_TOKEN_IDS = 1024


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose the next tokens and when to stop.

    `temperature` 0 is greedy. `top_k` 0 (or -1), `top_p` 1.0 and `min_p` 0.0 switch the filter off; filters
    apply in the order temperature, top-k, top-p, min-p. Presence and frequency penalties are subtracted from
    the logits of tokens already generated; the repetition penalty divides (positive) or multiplies (negative)
    logits of tokens in the prompt or the output. `max_tokens` None means up to the context length.
    `logprobs` n returns the chosen token's log-probability and the n likeliest alternatives, taken from the
    unmodified logits; `prompt_logprobs` does so for each prompt token. `allowed_token_ids` are the only
    tokens that may be chosen, the end of sequence among them or not. A `seed` makes a request's random stream
    a function of (seed, position) alone, whatever else is in the batch.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: list[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    grammar: str | None = None

    def validate(self, vocab_size: int | None = None) -> None:
        """Raises RequestError, naming the field, if a value is of the wrong type or outside its range."""
        self._validate_types()
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                bounds = f"between {low:g} and {high:g}" if high < math.inf else f"at least {low:g}"
                raise RequestError(f"{name} must be {bounds}, got {value!r}.", param=name)
        if self.top_p == 0:
            raise RequestError("top_p must be greater than 0 and at most 1, got 0.", param="top_p")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).",
                param="min_tokens",
            )
        if len(self.stop) > MAX_STOP_STRINGS or not all(
            0 < len(stop) <= MAX_STOP_CHARS for stop in self.stop
        ):
            raise RequestError(
                f"stop takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters.",
                param="stop",
            )
        if self.grammar is not None and not 0 < len(self.grammar) <= MAX_GRAMMAR_CHARS:
            raise RequestError(f"grammar takes 1 to {MAX_GRAMMAR_CHARS} characters.", param="grammar")
        self._validate_ids(vocab_size)

    def _validate_types(self) -> None:
        """A struct made in Python (not decoded) may hold anything; the engine process must not find out."""
        try:
            msgspec.convert(msgspec.to_builtins(self), SamplingParams)
        except (msgspec.ValidationError, TypeError) as error:
            text = str(error)
            _, _, name = text.rpartition("$.")
            raise RequestError(
                f"Sampling parameters: {text}.", param=name.partition("[")[0].rstrip("`") or None
            ) from error

    def fit(self, num_prompt_tokens: int, max_model_len: int, *, param: str = "prompt") -> SamplingParams:
        """With `max_tokens` cut to what the context leaves: it is a cap, not a reservation.

        Raises ContextLengthError, naming `param`, if the prompt leaves no room for one token (or, with
        `max_tokens` 0, does not fit itself).
        """
        room = max_model_len - num_prompt_tokens
        if room < (self.max_tokens != 0):
            raise ContextLengthError(num_prompt_tokens, max_model_len, param=param)
        max_tokens = room if self.max_tokens is None else min(self.max_tokens, room)
        return msgspec.structs.replace(
            self, max_tokens=max_tokens, min_tokens=min(self.min_tokens, max_tokens)
        )

    @property
    def has_penalties(self) -> bool:
        """Whether a choice depends on how often each token has been chosen before."""
        neutral = self.repetition_penalty == 1 and self.presence_penalty == 0
        return not (neutral and self.frequency_penalty == 0)

    def for_choice(self, index: int) -> SamplingParams:
        """For choice `index` of the same prompt: seed + index, wrapped to 64 bits."""
        if self.seed is None or index == 0:
            return self
        return msgspec.structs.replace(self, seed=(self.seed + index + 2**63) % 2**64 - 2**63)

    def _validate_ids(self, vocab_size: int | None) -> None:
        bias = self.logit_bias or {}
        if len(bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens, got {len(bias)}.", param="logit_bias"
            )
        for token, value in bias.items():
            if not (math.isfinite(value) and -100 <= value <= 100):
                raise RequestError(f"logit_bias[{token}] must be between -100 and 100.", param="logit_bias")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} tokens, got {len(self.stop_token_ids)}.",
                param="stop_token_ids",
            )
        allowed = self.allowed_token_ids
        if allowed is not None and not 1 <= len(allowed) <= MAX_ALLOWED_TOKEN_IDS:
            raise RequestError(
                f"allowed_token_ids takes 1 to {MAX_ALLOWED_TOKEN_IDS} tokens, got {len(allowed)}.",
                param="allowed_token_ids",
            )
        if allowed is not None and self.min_tokens:
            # The two together may leave no token to choose.
            raise RequestError(
                "allowed_token_ids cannot be combined with min_tokens; leave the end of sequence out of it.",
                param="allowed_token_ids",
            )
        limit = vocab_size if vocab_size is not None else math.inf
        for name, ids in (
            ("logit_bias", bias),
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", allowed or ()),
        ):
            for token in ids:
                if not 0 <= token < limit:
                    raise RequestError(f"{name} holds token id {token}, outside the vocabulary.", param=name)


_INT64_MAX = 2**63 - 1
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 0, math.inf),
    ("min_tokens", 0, math.inf),
    ("temperature", 0, 2),
    ("top_p", 0, 1),
    ("top_k", -1, math.inf),
    ("min_p", 0, 1),
    ("repetition_penalty", 0.01, 100),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("seed", -_INT64_MAX - 1, _INT64_MAX),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("n", 1, 128),
)


SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint recommends where a request is silent: the fields above that its config holds.

    Raises RequestError, naming the field, for a value that no request could use. `do_sample` is not looked
    at: OpenAI's clients expect sampling unless they ask for temperature 0.
    """
    found = {n: generation_config[n] for n in SAMPLING_DEFAULTS if generation_config.get(n) is not None}
    if isinstance(found.get("top_k"), float) and found["top_k"].is_integer():
        found["top_k"] = int(found["top_k"])
    SamplingParams(**found).validate()
    return found


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One choice to generate: a client's request with n choices is n of these in one `group`.

    `prompt` is token ids, used as they are. `max_tokens` in `params` has been resolved by the caller to a
    number that fits the context. Requests of a `group` have the same prompt and share its KV blocks even
    where prefix caching is off. Lower `priority` runs first. `cache_salt` separates prefix caches.
    `end_token_ids` end the sequence as the model's own end-of-sequence tokens do.

    With `pooling` nothing is generated (`max_tokens` is 0): the answer is the hidden state, after the final
    norm, of the prompt's last token, or the mean over all its tokens.
    """

    request_id: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    group: str | None = None
    cache_salt: str | None = None
    end_token_ids: tuple[int, ...] = ()
    pooling: Pooling | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token, its rank (1 = likeliest), and the likeliest tokens with theirs."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class TokenOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step (or a merge of several) produced for one request.

    Exactly one TokenOutput of a request has a `finish_reason`, and it is the last. On "stop",
    `stop_token_id` is the end-of-sequence or stop token that ended it; it is the last of `token_ids`.
    `prompt_logprobs` comes once, with the first output; its first entry is None (nothing precedes the first
    token). `pooled` comes with the one output of a request with `pooling`: E float32 numbers, little-endian,
    not normalised. `error` explains "error"; `refused`: the request brought it with it. `queue_s`, with the
    first output, is how long the request waited to be computed.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    pooled: bytes | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    refused: bool = False
    queue_s: float | None = None


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the API process must know of a loaded engine."""

    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    num_heads: int
    num_kv_heads: int
    num_blocks: int
    block_size: int
    kv_bytes_per_token: int
    kv_dtype: str
    weight_bytes: int
    dtype: str
    """How most of the weights are held: "bfloat16", "int8"."""
    quantization: str
    """The integer formats among the weights, joined by "+", the largest first; "none" without any."""
    device: str
    backend: str
    max_num_seqs: int
    instruction_set: str = ""
    """What the native backend computes with: "avx512"."""
    max_waiting: int = 0
    generation_config: dict[str, Any] = {}
    """The checkpoint's generation_config.json: sampling defaults among others."""
    hidden_size: int = 0
    """Numbers in a hidden state, so in an embedding."""


class Request:
    """An `EngineRequest` under way inside the engine.

    `tokens` is the prompt followed by the output, as far as their values are known here. `num_tokens` counts
    those too that steps in flight choose; the latest is row `sample_row` of what its step samples.
    `num_computed_tokens` have their KV in the cache, or will once the steps in flight are done; the one rule
    of the scheduler makes it catch up with `num_tokens`, which ends at `max_num_tokens`. Lower `order` runs
    first. `unsent` are tokens of the output that wait for the next `TokenOutput`.
    """

    constraint: Constraint | None = None

    def __init__(self, spec: EngineRequest, arrival: int, seed: int, max_model_len: int) -> None:
        self.spec = spec
        self.request_id = spec.request_id
        self.params = spec.params
        self.order = (spec.priority, arrival)
        self.seed = seed
        self.tokens = list(spec.prompt)
        self.num_tokens = self.num_prompt_tokens = len(spec.prompt)
        self.sample_row = -1
        self.max_num_tokens = max_model_len
        if spec.params.max_tokens is not None:
            self.max_num_tokens = min(max_model_len, len(spec.prompt) + spec.params.max_tokens)
        # Nothing follows the last token a request may have, so that its KV is not needed.
        self._max_computed_tokens = max(len(spec.prompt), self.max_num_tokens - 1)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.pool = Pool()
        self.unsent: list[int] = []
        self.has_output = False
        self.added_s = time.monotonic()
        self.queue_s: float | None = None  # None until it is first computed

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, those included whose value is not known yet."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose KV is still to be computed; 0 for a request that ends when its last one is known."""
        return min(self.num_tokens, self._max_computed_tokens) - self.num_computed_tokens

    @property
    def needs_last_token(self) -> bool:
        """Whether the host must know the last token before the request's next step is launched."""
        needed = self.params.has_penalties or self.constraint is not None
        return needed and self.num_pending_tokens > 0

    @property
    def takes_forced_tokens(self) -> bool:
        """Whether tokens that must come next are appended at once: not if anybody wants their logits."""
        return self.params.logprobs is None and not self.scores_prompt

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt log-probabilities are wanted and not complete yet."""
        return self.params.prompt_logprobs is not None and not self.has_output

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every prompt token's hidden state is needed, so that none may come from a cache."""
        return self.scores_prompt or self.spec.pooling == "mean"

    def add_prompt_logprobs(self, start: int, entries: Iterable[TokenLogprobs]) -> None:
        """Those that a row beginning at `start` gave. After a preemption they all come again."""
        if start == 0:
            self.prompt_logprobs = [None]
        self.prompt_logprobs += entries
