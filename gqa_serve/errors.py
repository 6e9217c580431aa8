"""The exception tree.

Every message is a sentence for the user that names the cure. `GqaServeError` reaching the command
line prints that sentence and exits with status 1; `RequestError` reaching the HTTP API becomes an
OpenAI error body with its `status`, `type`, `param` and `code`.
"""

from __future__ import annotations

from collections.abc import Mapping


class GqaServeError(Exception):
    """Anything this package raises on purpose."""


class ConfigError(GqaServeError):
    """A flag, environment variable or configuration file holds a value that cannot be used."""


class ModelError(GqaServeError):
    """A checkpoint is missing, damaged, or describes something that cannot be served."""


class UnsupportedModelError(ModelError):
    """The checkpoint is intact, but its architecture or one of its options is not supported."""


class HubError(ModelError):
    """The model hub refused, lacks, or could not deliver the files."""


class CacheCapacityError(GqaServeError):
    """The KV cache does not hold what was asked of it."""


class RanksLostError(GqaServeError):
    """A tensor-parallel rank died, or the ranks are out of step: whoever runs the engine must replace it."""


class RequestError(GqaServeError):
    """One request is wrong; the server is fine. Maps to one OpenAI error body."""

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.headers: Mapping[str, str] = {}
        """Of the HTTP response, beyond those that every response has."""


class ContextLengthError(RequestError):
    """The prompt alone does not fit the model's context."""

    def __init__(self, num_prompt_tokens: int, max_model_len: int, *, param: str | None = None) -> None:
        exact = num_prompt_tokens <= max_model_len  # longer ones do not fit even where nothing is generated
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has "
            f"{num_prompt_tokens} tokens{' and at least one must be left to generate' if exact else ''}. "
            "Shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_model_len = max_model_len


class NotFoundError(RequestError):
    """Unknown model, route or object."""

    status = 404


class QueueFullError(RequestError):
    """The waiting queue is full; try again after `retry_after_s` seconds."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, code="queue_full")
        self.retry_after_s = retry_after_s


class EngineUnavailableError(RequestError):
    """The engine is loading, restarting or stopping."""

    status = 503
    type = "service_unavailable_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="engine_unavailable")


class QueueTimeoutError(RequestError):
    """The request waited longer than `--queue-timeout`; try again after `retry_after_s` seconds."""

    status = 503
    type = "service_unavailable_error"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, code="queue_timeout")
        self.retry_after_s = retry_after_s


class EngineStepError(RequestError):
    """The step that computed this request failed, or the engine died under it."""

    status = 500
    type = "server_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="engine_error")
