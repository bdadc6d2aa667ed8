"""A number of the device that is read later, without waiting for what was queued since."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class LateNumber:
    """Begins to copy a number from the device; who reads it waits for that copy alone.

    `float(tensor)` would wait for everything that the device still has to do, and a GPU would stand
    idle while the CPU then prepares more.

    Args:
        value: The number; under FSDP, every process has to ask.
    """

    def __init__(self, value: Float[Tensor, ""]) -> None:
        whole = getattr(value, "full_tensor", None)  # of what FSDP2 splits
        value = value.detach() if whole is None else whole().detach()
        self._host = value.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if value.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> float:
        """Return the number."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._host)
