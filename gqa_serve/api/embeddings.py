"""POST /v1/embeddings: texts or token ids in, vectors of length 1 out.

Owns the request's own fields and the answer's shape; `prompts.py` reads the inputs, the engine pools hidden
states, `serving.py` runs it. Invariant: vectors come in the order of the inputs, and one vector's bits depend
on its own input alone.
"""

from __future__ import annotations

import base64

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gqa_serve.api.answers import Embedding, EmbeddingList, EmbeddingUsage
from gqa_serve.api.json_guard import read_request
from gqa_serve.api.params import MAX_CHOICES, FieldRules, check_capacity
from gqa_serve.api.prompts import Truncation, count_prompts, encode_prompts, split_prompt
from gqa_serve.api.protocol import EmbeddingRequest, SamplingFields
from gqa_serve.api.request_ids import client_request_id
from gqa_serve.api.serving import (
    Job,
    ServingContext,
    fingerprint,
    off_loop,
    submit,
    unless_gone,
)
from gqa_serve.api.text_stream import TextEvent
from gqa_serve.engine.pooling import unit_vector
from gqa_serve.engine.request import ModelInfo, SamplingParams
from gqa_serve.engine.stop_strings import StopStrings
from gqa_serve.errors import RequestError


class Embeddings:
    """The endpoint."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._rules = FieldRules.embedding()

    async def post(self, request: Request) -> Response:
        """Decode, check, tokenize, compute. Raises RequestError."""
        context = self._context
        context.engine.check_room()
        fields, raw = await read_request(request, context.bodies, EmbeddingRequest)
        model = context.check_model(fields.model)
        self._rules.check(raw)
        info = context.ready_info()
        _check_dimensions(fields, info)
        job = await self._job(fields, info, model)
        request_id = client_request_id(request.scope) or job.id
        generation = submit(context, job, StopStrings([]), request.scope)
        headers = {"x-request-id": request_id, **generation.admission.headers()}
        try:
            events = await unless_gone(request, generation.collect())
            num_tokens = sum(map(len, job.prompts))
            body = await off_loop(
                len(events) * info.hidden_size, lambda: _answer(events, fields, model, num_tokens)
            )
        finally:
            generation.end()
        return Response(body, 200, headers, "application/json")

    async def _job(self, fields: EmbeddingRequest, info: ModelInfo, model: str) -> Job:
        """One engine request per input, which generates nothing. Raises RequestError."""
        tokenizer = self._context.tokenizer
        num_inputs = count_prompts(fields.input)
        if num_inputs > MAX_CHOICES:
            raise RequestError(
                f"input holds {num_inputs} inputs, more than {MAX_CHOICES}. Send several requests.",
                param="input",
            )
        check_capacity(info, num_inputs, 1, prompts="input")
        truncation = Truncation.read(fields.truncate_prompt_tokens, 0, info.max_model_len)
        add_special = fields.add_special_tokens is not False

        def encode(item: str | list[int]) -> list[int]:
            if isinstance(item, list):
                return item
            return tokenizer.encode(item, add_special_tokens=add_special, parse_special=True)

        items = split_prompt(fields.input, None if truncation.keep else info.max_model_len, "input")
        prompts = await encode_prompts(items, tokenizer, info, encode, truncation)
        nothing = SamplingParams(max_tokens=0)
        return Job.new(
            "embd",
            kind="embedding",
            model=model,
            fingerprint=fingerprint(info),
            fields=SamplingFields(priority=fields.priority, cache_salt=fields.cache_salt),
            prompts=[prompt.ids for prompt in prompts],
            params=[nothing.fit(len(p.ids), info.max_model_len, param=p.param) for p in prompts],
            n=1,
            pooling="mean" if (fields.pooling or self._context.config.pooling) == "mean" else "last",
        )


def _check_dimensions(fields: EmbeddingRequest, info: ModelInfo) -> None:
    if fields.dimensions is not None and not 1 <= fields.dimensions <= info.hidden_size:
        raise RequestError(
            f"dimensions must be between 1 and {info.hidden_size}, this model's; got {fields.dimensions}.",
            param="dimensions",
        )


def _answer(events: list[TextEvent], fields: EmbeddingRequest, model: str, num_tokens: int) -> bytes:
    """The body: vectors as lists of numbers, or as base64 of their little-endian float32 bytes."""
    data = []
    for event in events:
        if event.pooled is None:
            raise RuntimeError("The engine gave no vector for a request with pooling.")
        vector = unit_vector(event.pooled, fields.dimensions)
        shown: str | list[float]
        if fields.encoding_format == "base64":
            shown = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        else:
            shown = vector.tolist()
        data.append(Embedding(event.index, shown))
    usage = EmbeddingUsage(num_tokens, num_tokens)
    return msgspec.json.encode(EmbeddingList(data=data, model=model, usage=usage))
