"""What a pipeline schedule can run: the rules of torch.distributed.pipelining, checked before it starts."""

from __future__ import annotations

from moeforge.errors import UserError

SCHEDULES = ("1f1b", "interleaved-1f1b", "zero-bubble", "zbv")


def require_schedule(schedule: str, stages: int, pp: int, micro_batches: int | None = None) -> None:
    """Raise UserError, naming the key, for stage or micro-batch counts that `schedule` cannot run.

    1f1b takes one stage a rank and at least as many micro-batches as stages; interleaved-1f1b two stages a rank or
    more and zero-bubble (ZB-H1, or interleaved with more) any number, with micro-batches in rounds of about pp that
    are equally long; zbv (Qi et al., 2024) exactly two stages a rank.
    """
    if schedule not in SCHEDULES:
        raise UserError(f'parallel.schedule = "{schedule}": must be one of {", ".join(SCHEDULES)}')
    chunks = stages // pp
    allowed = {"1f1b": "1", "interleaved-1f1b": "at least 2", "zero-bubble": "at least 1", "zbv": "2"}[schedule]
    fits = {"1f1b": chunks == 1, "interleaved-1f1b": chunks >= 2 or pp == 1, "zero-bubble": True}
    if stages % pp or chunks < 1 or not fits.get(schedule, chunks == 2 or pp == 1):
        raise UserError(
            f'parallel.schedule = "{schedule}": takes {allowed} stages a rank, but there are {stages} stages on '
            f"{pp} pipeline ranks"
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
            f"{rounds} rounds divide, but a step has {micro_batches}; a multiple of parallel.pp ({pp}) always fits"
        )
