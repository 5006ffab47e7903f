"""Time on a device: the processor's clock, or a GPU's, which goes on after its work was launched."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event


class Clock:
    """Marks between pieces of work; `seconds` between two of them, once `wait` has returned."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Mark:
        """Now; on a GPU the moment at which all that was launched before is done."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        """Until all marks lie in the past."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @staticmethod
    def seconds(begin: Mark, end: Mark) -> float:
        """Seconds from one mark to another of the same clock."""
        if isinstance(begin, torch.cuda.Event):
            assert isinstance(end, torch.cuda.Event)
            return begin.elapsed_time(end) / 1e3
        assert not isinstance(end, torch.cuda.Event)
        return end - begin
