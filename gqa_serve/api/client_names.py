"""The names of a request's fields as its client spelled them, for endpoints that translate to a chat request.

Owns the way back: an error about `messages[3].content` names `input[5]` if that is where the message came
from. Knows nothing of what the fields mean. Invariant: only the `param` and its mentions in the message
change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gqa_serve.errors import RequestError


class ClientNames:
    """Paths of a `ChatRequest`, each with the path it was translated from."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)

    @contextmanager
    def translating(self) -> Iterator[None]:
        """A RequestError raised inside goes on in the client's words."""
        try:
            yield
        except RequestError as error:
            self.translate(error)
            raise

    def translate(self, error: RequestError) -> None:
        """Give the error the client's `param`."""
        param = error.param
        if param is None:
            return
        prefix = max((name for name in self._names if _leads_to(name, param)), key=len, default=None)
        if prefix is not None:
            error.param = self._names[prefix] + param[len(prefix) :]
            error.message = error.message.replace(param, error.param)


def _leads_to(prefix: str, path: str) -> bool:
    """Whether `path` is `prefix` or something inside it."""
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", ".", "[")
