"""Both ends of a profile: `Profiles` asks for it in the API process, `Profiling` records it in the engine's.

Owns that there is one at a time, and that whatever goes wrong with a profile ends the profile only. Knows the
profiler by `profile.py`, which it imports when one is asked for: only the engine's process has torch loaded.
Invariant: every `Profile` is answered by one `Profiled`, unless an `EndProfile` said that nobody waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from gqa_serve.engine.wire import EndProfile, FromEngine, Profile, Profiled, ToEngine
from gqa_serve.errors import EngineUnavailableError, RequestError

if TYPE_CHECKING:
    from gqa_serve.engine.core import Engine
    from gqa_serve.engine.profile import StepProfile

_WRITE_TIMEOUT_S = 120.0  # for the step under way, and for writing the trace

logger = logging.getLogger(__name__)


class ProfileBusyError(RequestError):
    """Somebody else's profile is being recorded."""

    status = 409

    def __init__(self) -> None:
        super().__init__(
            "A profile is being recorded already; ask again when it is done.", code="profile_running"
        )


class ProfileError(RequestError):
    """The profiler failed."""

    status = 500
    type = "server_error"


class Profiles:
    """Asks the engine process, by `send`."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self._send = send
        self._next_id = 0
        self._answer: asyncio.Future[Profiled] | None = None

    async def record(self, num_steps: int, timeout_s: float) -> Profiled:
        """A profile of the next `num_steps` steps that compute something, or of those within `timeout_s`.

        Raises ProfileBusyError, ProfileError, and EngineUnavailableError if the process goes away.
        """
        if self._answer is not None:
            raise ProfileBusyError
        self._next_id += 1
        ask_id = self._next_id
        answer = self._answer = asyncio.get_running_loop().create_future()
        try:
            self._send(Profile(ask_id, num_steps))
            done, _ = await asyncio.wait((answer,), timeout=timeout_s)
            if not done:
                self._send(EndProfile(ask_id, wanted=True))
                done, _ = await asyncio.wait((answer,), timeout=_WRITE_TIMEOUT_S)
            if not done:
                raise EngineUnavailableError("The engine did not answer with the profile in time.")
            profiled: Profiled = answer.result()
        finally:
            self._answer = None
            if not answer.done():
                answer.cancel()
                self._send(EndProfile(ask_id, wanted=False))
        if profiled.error is not None:
            raise ProfileError(profiled.error)
        return profiled

    def deliver(self, profiled: Profiled) -> None:
        """The answer came; one that nobody waits for any more is dropped."""
        if self._answer is not None and not self._answer.done() and profiled.ask_id == self._next_id:
            self._answer.set_result(profiled)

    def fail(self, message: str) -> None:
        """The engine process is gone."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(EngineUnavailableError(message))


class Profiling:
    """Records profiles of `engine`, answering by `send`."""

    def __init__(self, engine: Engine, send: Callable[[FromEngine], None]) -> None:
        self._engine = engine
        self._send = send
        self._ask_id = 0
        self._profile: StepProfile | None = None

    def take(self, message: Profile | EndProfile) -> None:
        """Begin or end one."""
        if isinstance(message, Profile):
            self._discard()
            self._ask_id = message.ask_id
            try:
                from gqa_serve.engine.profile import StepProfile

                self._profile = StepProfile(self._engine, message.num_steps)
            except Exception:
                self._failed()
        elif message.ask_id == self._ask_id:
            if message.wanted:
                self._finish()
            else:
                self._discard()

    def stepped(self, num_requests: int) -> None:
        """A step of so many requests is done."""
        if self._profile is not None and self._profile.stepped(num_requests):
            self._finish()

    def _finish(self) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        try:
            self._send(Profiled(self._ask_id, profile.num_steps, profile.finish()))
        except Exception:
            self._failed()

    def _discard(self) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            try:
                profile.discard()
            except Exception:
                logger.exception("A profile could not be ended.")

    def _failed(self) -> None:
        logger.exception("A profile could not be recorded.")
        self._send(Profiled(self._ask_id, 0, b"", "The profiler failed; the server's log says why."))
