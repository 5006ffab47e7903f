"""A rank other than 0: `python -m moeforge.serve.worker`, started by rank 0.

It does what rank 0 says on its standard input, and ends with it: when rank 0 ends, however it ends, the pipe closes.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from typing import Any, BinaryIO, NoReturn

import torch

from moeforge.errors import RunError, UserError
from moeforge.serve.ranks.frames import read_frame
from moeforge.serve.ranks.rank import Rank, join, rank_device
from moeforge.serve.ranks.setup import Setup
from moeforge.serve.step import StepBatch

# A rank whose operation with the others breaks off is most likely not the one to blame: that one is heard first.
_MODEST_SECONDS = 1.0


class Leader:
    """The way to rank 0 and back."""

    def __init__(self) -> None:
        # What libraries print must not get between, and nobody else reads from the pipe.
        pipe_in, self._out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", buffering=1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        line = pipe_in.readline()
        if not line:
            os._exit(0)
        self.setup = Setup.from_json(line.decode())
        self._frames: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(pipe_in,), daemon=True).start()

    def _read(self, pipe: BinaryIO) -> None:
        while (frame := read_frame(pipe)) is not None:
            self._frames.put(frame)
        shutil.rmtree(self.setup.store.parent, ignore_errors=True)  # which rank 0 may not have come to
        os._exit(0)  # at once, whatever the main thread waits for

    def next(self) -> list[int]:
        """The next list of integers, however long it takes."""
        return self._frames.get()

    def say(self, value: int) -> None:
        """A number for rank 0."""
        self._write({"value": value})

    def least(self, number: int) -> int:
        """See `Rank`."""
        self.say(number)
        return self.next()[0]

    def fail(self, error: BaseException) -> NoReturn:
        """Say why, and end."""
        user = isinstance(error, UserError)
        if user or isinstance(error, RunError):
            message = str(error)
        else:
            if type(error) is RuntimeError or isinstance(error, torch.distributed.DistError):
                time.sleep(_MODEST_SECONDS)
            traceback.print_exception(error)
            message = f"{type(error).__name__}: {error}"
        self._write({"error": message, "user": user})
        os._exit(1)

    def _write(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")


def serve(leader: Leader) -> NoReturn:
    """Be the rank that rank 0 has set up, until it ends."""
    setup = leader.setup
    torch.set_num_threads(setup.threads)
    size = setup.layout.world_size
    device = rank_device(setup.config.device, setup.index, size)
    leader.say(0)  # ready to meet the others: whoever waits for them cannot be interrupted
    group = join(setup.index, size, device, setup.store)
    rank = Rank(setup.index, size, device, group, leader.least)
    runner = setup.factory()(setup.config, setup.model, setup.layout, rank)
    leader.say(runner.num_blocks)
    while True:
        runner.forward(StepBatch.decode(leader.next()))


def main() -> NoReturn:
    """The process."""
    # Those who end a service signal all its processes; rank 0 alone decides when the others may go.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    leader = Leader()
    try:
        serve(leader)
    except BaseException as error:
        leader.fail(error)


if __name__ == "__main__":
    sys.exit(main())
