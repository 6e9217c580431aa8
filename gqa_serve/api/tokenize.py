"""POST /tokenize and /detokenize, GET /tokenizer_info: the model's tokenizer, in vLLM's form.

Owns these answers. A conversation takes the same way as in chat, so that its count is what chat would use.
Asks the engine for nothing but the loaded model's sizes: it answers however busy the engine is.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gqa_serve.api.answers import Detokenized, Tokenized, TokenizerInfo
from gqa_serve.api.chat_request import encode_request
from gqa_serve.api.json_guard import RawFields, read_request
from gqa_serve.api.params import FieldRules
from gqa_serve.api.prompts import check_ids
from gqa_serve.api.protocol import DetokenizeRequest, TokenizeRequest
from gqa_serve.api.serving import ServingContext, off_loop
from gqa_serve.engine.request import ModelInfo
from gqa_serve.errors import RequestError

# How many times the context a conversation may be long and still be counted.
_COUNTED_CONTEXTS = 16


class Tokenize:
    """The endpoints."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._rules = FieldRules.tokenize()
        self._detokenize_rules = FieldRules.detokenize()

    def _info(self) -> ModelInfo:
        """The model's sizes, also while the engine restarts or stops. Raises EngineUnavailableError."""
        return self._context.engine.model_info or self._context.ready_info()

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a prompt or a conversation. Raises RequestError."""
        context = self._context
        fields, raw = await read_request(request, context.bodies, TokenizeRequest)
        context.check_model(fields.model)
        self._rules.check(raw)
        info = self._info()
        if (fields.prompt is None) != bool(fields.messages):
            raise RequestError("Send either prompt or messages, and not both.", param="prompt")
        if fields.prompt is None:
            ids = await self._conversation(fields, raw, info)
        else:
            ids = await self._prompt(fields.prompt, fields, info)

        def answer() -> bytes:
            texts = [context.tokenizer.token(id_) for id_ in ids] if fields.return_token_strs else None
            return msgspec.json.encode(Tokenized(len(ids), info.max_model_len, ids, texts))

        return Response(await off_loop(len(ids), answer), 200, None, "application/json")

    async def _prompt(self, text: str, fields: TokenizeRequest, info: ModelInfo) -> list[int]:
        tokenizer = self._context.tokenizer
        tokenizer.check_length(len(text), info.max_model_len, param="prompt")
        add_special = fields.add_special_tokens is not False
        return await off_loop(
            len(text),
            lambda: tokenizer.encode(text, add_special_tokens=add_special, parse_special=True),
        )

    async def _conversation(self, fields: TokenizeRequest, raw: RawFields, info: ModelInfo) -> list[int]:
        """As chat encodes it, also where it is too long for the model: that is what counting is for."""
        size = memoryview(raw["messages"]).nbytes
        self._context.tokenizer.check_length(size, info.max_model_len, param="messages")
        return await encode_request(self._context, fields, size, info.max_model_len * _COUNTED_CONTEXTS)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, special tokens shown. Raises RequestError."""
        context = self._context
        fields, raw = await read_request(request, context.bodies, DetokenizeRequest)
        context.check_model(fields.model)
        self._detokenize_rules.check(raw)
        info = self._info()

        def answer() -> bytes:
            check_ids(fields.tokens, info.vocab_size, "tokens")
            text = context.tokenizer.decode(fields.tokens, skip_special_tokens=False)
            return msgspec.json.encode(Detokenized(text))

        return Response(await off_loop(len(fields.tokens), answer), 200, None, "application/json")

    async def info(self, request: Request) -> Response:
        """The special tokens by name: what an evaluation harness must know to use the tokenizer from afar."""
        names = self._context.tokenizer.special_tokens
        answer = TokenizerInfo(
            bos_token=names.get("bos_token"),
            eos_token=names.get("eos_token"),
            pad_token=names.get("pad_token"),
            unk_token=names.get("unk_token"),
            vocab_size=self._info().vocab_size,
        )
        return Response(msgspec.json.encode(answer), 200, None, "application/json")
