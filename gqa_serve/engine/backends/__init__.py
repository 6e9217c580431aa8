"""The backends, and which of them serves a device.

Owns the choice; each backend is one module beside this one. Imports a backend's module only when it is
chosen, so that one backend's needs are not another's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from gqa_serve.engine.backends.base import Backend


def create_backend(device: torch.device) -> Backend:
    """The backend for `device`: the reference, which serves every device torch does."""
    from gqa_serve.engine.backends.reference import ReferenceBackend

    return ReferenceBackend(device)
