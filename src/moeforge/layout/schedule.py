"""What a pipeline schedule can run: the rules of torch.distributed.pipelining, checked before it starts."""

from __future__ import annotations

from moeforge.errors import UserError

SCHEDULES: dict[str, tuple[int, int | None]] = {
    "1f1b": (1, 1),
    "interleaved-1f1b": (2, None),
    "zero-bubble": (1, None),
    "zbv": (2, 2),
}
"""Least and largest number of stages that a pipeline rank may hold."""


def require_schedule(schedule: str, stages: int, pp: int, micro_batches: int | None = None) -> None:
    """Raises UserError, naming the key, for stage or micro-batch counts that `schedule` cannot run.

    1f1b takes one stage a rank and at least as many micro-batches as stages; interleaved-1f1b two stages a rank or
    more, zero-bubble (ZB-H1, or interleaved) any number, both with micro-batches in equal rounds of about pp; zbv (Qi
    et al., 2024) two stages a rank. Without `micro_batches` only the stages are looked at.
    """
    if schedule not in SCHEDULES:
        raise UserError(f'parallel.schedule = "{schedule}": must be one of {", ".join(SCHEDULES)}')
    least, most = SCHEDULES[schedule]
    if stages % pp or not least <= stages // pp <= (most or stages):
        chunks = f"{least}" if least == most else f"{least} or more"
        raise UserError(
            f'parallel.schedule = "{schedule}": takes {chunks} stages a rank, but there are {stages} stages on {pp} '
            "pipeline ranks; set parallel.chunks"
        )
    if micro_batches is None or pp == 1:
        return
    if schedule == "1f1b" and micro_batches < stages:
        raise UserError(
            f'parallel.schedule = "{schedule}": needs at least as many micro-batches as stages ({stages}), but a step '
            f"has {micro_batches}; raise train.batch_sequences or lower train.micro_batch_sequences"
        )
    rounds = max(1, micro_batches // pp)
    if schedule in ("interleaved-1f1b", "zero-bubble") and micro_batches % rounds:
        raise UserError(
            f'parallel.schedule = "{schedule}": needs fewer micro-batches than {2 * pp}, or a number that '
            f"{rounds} rounds divide, but a step has {micro_batches}; any multiple of parallel.pp ({pp}) fits"
        )
