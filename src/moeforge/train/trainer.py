"""The training loop of one process."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from moeforge.checkpoint import Checkpoint, save_model
from moeforge.config.schema import TrainConfig
from moeforge.data import Batch, PackedDataset
from moeforge.errors import RunError
from moeforge.evaluate import held_out_loss
from moeforge.model import DenseAttention, ForwardContext, RouterRecord, RoutingGroups, Transformer
from moeforge.model.units import Experts
from moeforge.train.balance import AdaptiveCoefficients, drop_rate
from moeforge.train.metrics import MetricsLog, Row, distribution_rows, router_rows
from moeforge.train.optimizer import Optimizer
from moeforge.train.result import TrainResult, read_result
from moeforge.train.schedule import learning_rate
from moeforge.train.state import TrainerState, load_optimizer_state, save_checkpoint
from moeforge.upcycle.similarity import expert_similarity

OnStep = Callable[[Row], None]


class TrainData(Protocol):
    """Where batches come from; `moeforge.data.PackedDataset` fits."""

    def batch(self, position: int, count: int) -> Batch:
        """The sequences with global numbers position..position+count-1."""
        ...

    def identity(self) -> str:
        """What the batches depend on, as a hash."""
        ...


class Trainer:
    """Optimiser steps over a packed dataset: `run` from the current step to the last.

    A step is: every micro-batch's summed loss over the step's target count, backward, gradient norm, update,
    balance control. Nothing but `state` and the weights carries over, which is what makes resuming exact. `lock`,
    whatever keeps other processes out of the run's directory, lives as long as the trainer.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        model: Transformer,
        source: Checkpoint,
        train_data: TrainData,
        held_out: PackedDataset | None,
        resumed: tuple[Path, TrainerState] | None = None,
        lock: object = None,
    ) -> None:
        self.config, self.run_dir, self.model, self.source = config, run_dir, model, source
        self.train_data, self.held_out, self._lock = train_data, held_out, lock
        self.device = next(model.parameters()).device
        options = config.optimizer
        self.optimizer = Optimizer(
            model,
            masters=config.model.precision == "bf16",
            kind=options.kind,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            expert_lr_scale=options.expert_lr_scale,
            clip_norm=options.clip_norm,
        )
        router = config.router
        self.balance = AdaptiveCoefficients(
            len(model.config.moe_layers), router.alpha_max, router.xi, router.beta, router.adaptive, self.device
        )
        self.step, self.position, self.tokens = 0, 0, 0
        if resumed is not None:
            directory, state = resumed
            self.step, self.position, self.tokens = state.step, state.position, state.tokens
            self.balance.load(state.alpha)
            self.optimizer.load(load_optimizer_state(directory))

    def train_step(self) -> Row:
        """One optimiser step; returns its row of metrics."""
        started = time.perf_counter()
        config, step = self.config, self.step + 1
        size, micro = config.train.batch_sequences, config.train.micro_batch_sequences
        batch = self.train_data.batch(self.position, size)
        targets = int((batch.targets != -100).sum())
        record = self._new_record(batch, size // micro, step)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for index in range(size // micro):
            part = batch.slice(index * micro, (index + 1) * micro)
            loss += self._backward(part, max(targets, 1), record, index)
        options, schedule = config.optimizer, config.schedule
        lr = learning_rate(
            self.step,
            config.train.steps,
            options.lr,
            schedule.kind,
            schedule.warmup_steps,
            schedule.min_lr_ratio,
            schedule.decay_fraction,
        )
        norm = self.optimizer.step(lr)
        row: Row = {"step": step, "tokens": self.tokens + batch.tokens.numel(), "loss": loss.item(), "lr": lr}
        row["grad_norm"] = norm.item()
        moe: list[Row] = []
        if record is not None:
            rates = drop_rate(record.totals(), config.router.scope, config.router.capacity_factor)
            moe = router_rows(record, rates)
            self.balance.update(rates)
            if record.distributions:
                row["gate_distribution"] = distribution_rows(record)
        seconds = time.perf_counter() - started
        if moe and _due(step, config.run.similarity_every, first=True):
            for layer in moe:
                experts = self.model.get_submodule(f"layers.{layer['layer']}.ffn.experts")
                assert isinstance(experts, Experts)
                layer["expert_similarity"] = expert_similarity(experts.w13, experts.w2).item()
        row |= {"tokens_per_second": batch.tokens.numel() / seconds, "seconds": seconds, "moe": moe}
        self.step, self.position = step, self.position + size
        self.tokens = row["tokens"]
        return row

    def _new_record(self, batch: Batch, micro_batches: int, step: int) -> RouterRecord | None:
        moe = self.model.config.moe
        if moe is None:
            return None
        return RouterRecord(
            self.model.config.moe_layers,
            moe.num_experts,
            micro_batches,
            self.balance.alpha,
            max(int((batch.documents >= 0).sum()), 1),
            self.config.router.aux_loss,
            distributions=_due(step, self.config.run.gate_distribution_every, first=True),
        )

    def _backward(self, part: Batch, targets: int, record: RouterRecord | None, index: int) -> torch.Tensor:
        """Forward and backward of one micro-batch; its share of the step's mean loss."""
        router = self.config.router
        sequences, positions = part.tokens.shape
        valid = None if bool((part.documents >= 0).all()) else (part.documents >= 0).flatten().to(self.device)
        groups = RoutingGroups(
            sequences // router.group_sequences, valid, router.capacity_factor, router.drop_tokens, sequences
        )
        context = ForwardContext(
            DenseAttention(sequences, positions, part.documents),
            groups=None if record is None else groups,
            record=record,
            micro_batch=index,
        )
        part = part.to(self.device)
        hidden = self.model(part.tokens.flatten(), part.positions.flatten(), context)
        loss = self.model.loss(hidden, part.targets.flatten(), context) / targets
        loss.backward()
        return loss.detach()

    def run(self, on_step: OnStep | None = None) -> TrainResult:
        """Train to the last step; evaluate, log and save as configured.

        SIGTERM and SIGINT let the step under way finish, save, and end the run; another one later acts as it would
        outside.
        """
        config = self.config
        log = MetricsLog(self.run_dir, self.step, config.run.tensorboard)
        saved = self.step
        with _Signals() as signals:
            if self.step == 0 and self.held_out is not None:
                log.write({"step": 0, "tokens": 0, "eval_loss": self.evaluate()})
            while self.step < config.train.steps and signals.caught is None:
                row = self.train_step()
                self._check_finite(row)
                last = self.step == config.train.steps
                if self.held_out is not None and (last or _due(self.step, config.eval.every)):
                    row["eval_loss"] = self.evaluate()
                log.write(row)
                if on_step is not None:
                    on_step(row)
                if _due(self.step, config.checkpoint.every) or (last and config.checkpoint.every > 0):
                    self.save()
                    saved = self.step
            cut_short = self.step < config.train.steps
            if cut_short and saved != self.step:
                self.save()
        log.close()
        return replace(
            read_result(self.run_dir),
            steps=self.step,
            tokens=self.tokens,
            interrupted=signals.caught if cut_short else None,
        )

    def evaluate(self) -> float:
        """Mean held-out loss over at most eval.sequences sequences (nats a token)."""
        assert self.held_out is not None
        result = held_out_loss(self.model, self._held_out_batches(self.held_out), self.device)
        return result.loss

    def _held_out_batches(self, data: PackedDataset) -> Iterator[Batch]:
        wanted, micro = min(self.config.eval.sequences, len(data)), self.config.train.micro_batch_sequences
        for start in range(0, wanted, micro):
            yield data.batch(start, min(micro, wanted - start))

    def save(self) -> Path:
        """Write a checkpoint of the current step."""
        state = TrainerState(
            self.step,
            self.position,
            self.tokens,
            self.balance.state(),
            self.train_data.identity(),
            self.config.model_dump(mode="json"),
        )
        return save_checkpoint(
            self.run_dir, self.model, self.optimizer.state(), state, self.source, self.config.checkpoint.keep
        )

    def save_final(self) -> Path:
        """Write run_dir/final: the trained model as a Hugging Face directory. Signals wait until it is there."""
        with _Signals():
            return save_model(self.model, self.run_dir / "final", tokenizer_from=self.source)

    def _check_finite(self, row: Row) -> None:
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise RunError(
                f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}: diverged; lower "
                f"optimizer.lr or raise schedule.warmup_steps (checkpoints are in {self.run_dir / 'checkpoints'})"
            )


def _due(step: int, every: int, first: bool = False) -> bool:
    return every > 0 and (step % every == 0 or (first and step == 1))


# A supervisor may signal a process and its group, a terminal twice: what follows this soon is the same request.
_ONE_INTENT_SECONDS = 2.0


class _Signals:
    """While open, SIGTERM and SIGINT only set `caught`, so that the step under way is finished and saved."""

    def __init__(self) -> None:
        self.caught: str | None = None
        self._since = 0.0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._catch)
            except ValueError:  # not the main thread: signals are not ours to handle
                break
        return self

    def _catch(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.caught is None:
            self.caught, self._since = signal.Signals(number).name, now
        elif now - self._since > _ONE_INTENT_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def __exit__(self, *exception: object) -> None:
        self._restore()
