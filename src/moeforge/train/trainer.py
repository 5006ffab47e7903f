"""The training loop, in one process or as one rank of many."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from moeforge.checkpoint import Checkpoint
from moeforge.config.schema import TrainConfig
from moeforge.data import PackedDataset
from moeforge.errors import RunError
from moeforge.evaluate import EvalResult
from moeforge.files import write_whole
from moeforge.model import RouterRecord, Transformer
from moeforge.model.units import Experts
from moeforge.parallel import Mesh
from moeforge.parallel.dispatcher import make_dispatcher
from moeforge.parallel.gather import save_distributed
from moeforge.parallel.parameters import ParameterPart, parameter_parts
from moeforge.parallel.pipeline import make_executor
from moeforge.parallel.similarity import distributed_similarity
from moeforge.parallel.traffic import Route
from moeforge.train.balance import AdaptiveCoefficients, drop_rate
from moeforge.train.determinism import repeatable
from moeforge.train.metrics import MetricsLog, Row, distribution_rows, router_rows
from moeforge.train.micro_batches import Lazy, MicroBatches, TrainData, targets_and_tokens
from moeforge.train.optimizer import MODEL_DTYPE, Optimizer
from moeforge.train.result import TrainResult, read_result
from moeforge.train.schedule import learning_rate
from moeforge.train.signals import Signals
from moeforge.train.state import Saver, TrainerState, load_entries

OnStep = Callable[[Row], None]


class Trainer:
    """Optimiser steps over a packed dataset: `run` from the current step to the last.

    A step is: every micro-batch's summed loss over the step's target count, backward, gradient norm, update,
    balance control. Nothing but `state` and the weights carries over, which is what makes resuming exact. All ranks
    call the same methods in the same order; the first one writes what a run leaves behind. `chunks` are this rank's
    stages of the model. `lock`, whatever keeps other runs out of the run's directory, lives as long as the trainer.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        mesh: Mesh,
        chunks: Sequence[Transformer],
        source: Checkpoint,
        train_data: TrainData,
        held_out: PackedDataset | None,
        lock: object = None,
    ) -> None:
        self.config, self.run_dir, self.mesh, self.chunks, self.source = config, run_dir, mesh, chunks, source
        self.train_data, self.held_out, self._lock = train_data, held_out, lock
        self.model_config = source.config
        for module in (each for chunk in chunks for each in chunk.modules()):
            if isinstance(module, Experts):
                module.trains_in_fp8 = config.model.expert_precision == "fp8"
        parameters: dict[str, nn.Parameter] = {}
        parts: dict[str, ParameterPart] = {}
        for stage, chunk in zip(mesh.stages, chunks, strict=True):
            parameters |= dict(chunk.named_parameters())
            parts |= parameter_parts(self.model_config, mesh.layout, stage, mesh.at.tp, mesh.at.expert_rank)
        options = config.optimizer
        self.optimizer = Optimizer(
            parameters,
            parts,
            mesh,
            zero=config.parallel.zero,
            masters=config.model.precision == "bf16",
            kind=options.kind,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            expert_lr_scale=options.expert_lr_scale,
            clip_norm=options.clip_norm,
        )
        self.dtype = MODEL_DTYPE[config.model.precision]
        self.executor = make_executor(chunks, mesh, self.dtype, self.optimizer.collect)
        top_k = self.model_config.moe.top_k if self.model_config.moe else 1
        dispatcher = make_dispatcher(mesh, top_k, config.parallel.dispatcher, config.parallel.overlap_chunks)
        self.micro_batches = MicroBatches(config, mesh, dispatcher)
        router = config.router
        self.balance = AdaptiveCoefficients(
            len(self.model_config.moe_layers), router.alpha_max, router.xi, router.beta, router.adaptive, mesh.device
        )
        self.saver = Saver()
        self.step, self.position, self.tokens = 0, 0, 0

    def resume(self, directory: Path, state: TrainerState) -> None:
        """Go on from the training checkpoint in `directory`, whatever layout wrote it."""
        self.step, self.position, self.tokens = state.step, state.position, state.tokens
        self.balance.load(state.alpha)
        load_entries(directory, self.optimizer.entries(), self.mesh)
        self.optimizer.restore(state.step)

    def train_step(self) -> Row:
        """One optimiser step; returns its row of metrics, the same on every rank."""
        with repeatable(self.config.run.deterministic):
            return self._train_step()

    def _train_step(self) -> Row:
        started = time.perf_counter()
        config, mesh, step = self.config, self.mesh, self.step + 1
        mesh.watchdog.at_step(step)
        with mesh.watchdog.doing("reading data"):
            batches = self.micro_batches.training(self.train_data, self.position)
        counts = mesh.dp.all_reduce(targets_and_tokens(batches).to(mesh.device))
        targets, routed = (max(count, 1) for count in counts.tolist())
        record = self._new_record(len(batches), routed, step)

        local_loss = self.executor.train(
            Lazy(len(batches), lambda i: self.micro_batches.prepare(batches[i], i, 1 / targets, record))
        )
        lr = self._learning_rate()
        norm = self.optimizer.step(lr)
        loss = self._over_ranks(local_loss).item()
        tokens = self.tokens + config.train.batch_sequences * config.data.sequence_length
        row: Row = {"step": step, "tokens": tokens, "loss": loss, "lr": lr, "grad_norm": norm.item()}
        moe: list[Row] = []
        if record is not None:
            record.reduce(self._over_ranks)
            rates = drop_rate(record.totals(), config.router.scope, config.router.capacity_factor)
            moe = router_rows(record, rates)
            self.balance.update(rates)
            if record.distributions:
                row["gate_distribution"] = distribution_rows(record)
        seconds = time.perf_counter() - started
        if moe and _due(step, config.run.similarity_every, first=True):
            for layer, similarity in zip(moe, self._expert_similarity(), strict=True):
                layer["expert_similarity"] = similarity
        row |= {"tokens_per_second": (tokens - self.tokens) / seconds, "seconds": seconds, "moe": moe}
        self.step, self.position, self.tokens = step, self.position + config.train.batch_sequences, tokens
        return row

    def _learning_rate(self) -> float:
        options, schedule = self.config.optimizer, self.config.schedule
        return learning_rate(
            self.step,
            self.config.train.steps,
            options.lr,
            schedule.kind,
            schedule.warmup_steps,
            schedule.min_lr_ratio,
            schedule.decay_fraction,
        )

    def _new_record(self, micro_batches: int, routed_tokens: int, step: int) -> RouterRecord | None:
        moe = self.model_config.moe
        if moe is None:
            return None
        return RouterRecord(
            self.model_config.moe_layers,
            moe.num_experts,
            micro_batches,
            self.balance.alpha,
            routed_tokens,
            self.config.router.aux_loss,
            distributions=_due(step, self.config.run.gate_distribution_every, first=True),
        )

    def _over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over stages and data-parallel ranks of what is equal on tensor-parallel ranks: one of them counts."""
        return self.mesh.world.all_reduce(x.clone() if self.mesh.at.tp == 0 else torch.zeros_like(x))

    def _expert_similarity(self) -> list[float]:
        """Of every MoE layer; each is held by one stage, and found by all ranks of a block together."""
        found = torch.zeros(len(self.model_config.moe_layers), dtype=torch.float64, device=self.mesh.device)
        for chunk in self.chunks:
            for name, unit in chunk.units():
                experts = getattr(unit, "experts", None)
                if isinstance(experts, Experts):
                    layer = int(name.split(".")[1])
                    similarity = distributed_similarity(self.mesh, layer, experts)
                    if self.mesh.at.dp == 0:
                        found[self.model_config.moe_layers.index(layer)] = similarity
        similarities: list[float] = self._over_ranks(found).tolist()
        return similarities

    def run(self, on_step: OnStep | None = None) -> TrainResult:
        """Train to the last step; evaluate, log and save as configured.

        SIGTERM and SIGINT, on any rank, let the step under way finish, save, and end the run; another one later acts
        as it would outside.
        """
        config, first = self.config, self.mesh.rank == 0
        log = MetricsLog(self.run_dir, self.step, config.run.tensorboard) if first else None
        saved = self.step
        with Signals() as signals:
            if self.step == 0 and self.held_out is not None:
                held_out = self.evaluate()
                if log is not None:
                    log.write({"step": 0, "tokens": 0, "eval_loss": held_out})
            while self.step < config.train.steps and not self._stopped(signals):
                row = self.train_step()
                self._check_finite(row)
                last = self.step == config.train.steps
                if self.held_out is not None and (last or _due(self.step, config.eval.every)):
                    row["eval_loss"] = self.evaluate()
                if log is not None:
                    log.write(row)
                if on_step is not None:
                    on_step(row)
                if _due(self.step, config.checkpoint.every) or (last and config.checkpoint.every > 0):
                    self.save()
                    saved = self.step
            cut_short = self.step < config.train.steps
            if cut_short and saved != self.step:
                self.save()
            self.saver.wait()
        if log is not None:
            log.close()
        self._write_traffic()
        interrupted = (signals.caught or "a signal on another rank") if cut_short else None
        result = replace(read_result(self.run_dir), steps=self.step, tokens=self.tokens, interrupted=interrupted)
        found: TrainResult = self.mesh.world.all_gather_object(result if first else None)[0]
        return found

    def _write_traffic(self) -> None:
        """traffic.json: bytes that all ranks have sent in this process's life, by group, operation and link."""
        total: Counter[Route] = Counter()
        for sent in self.mesh.world.all_gather_object(self.mesh.traffic.sent):
            total.update(sent)
        if self.mesh.rank == 0 and total:
            rows = [{**route._asdict(), "bytes": size} for route, size in sorted(total.items())]
            write_whole(self.run_dir / "traffic.json", json.dumps(rows, indent=1) + "\n")

    def _stopped(self, signals: Signals) -> bool:
        """Whether a signal has reached any rank or a save has failed: all must leave the loop at the same step."""
        stop = signals.caught is not None or self.saver.failed
        if self.mesh.world.size == 1:
            return stop
        return bool(self.mesh.world.all_reduce(torch.tensor(float(stop), device=self.mesh.device)) > 0)

    def evaluate(self) -> float:
        """Mean held-out loss over at most eval.sequences sequences (nats a token). No capacity, no dropped tokens, no
        router statistics: what inference computes."""
        assert self.held_out is not None
        with self.mesh.watchdog.doing("reading data"):
            batches = self.micro_batches.held_out(self.held_out)
        with repeatable(self.config.run.deterministic):
            loss = self.executor.evaluate(
                Lazy(len(batches), lambda i: self.micro_batches.prepare(batches[i], i, 1.0, None))
            )
        targets = self.mesh.dp.all_reduce(targets_and_tokens(batches).to(self.mesh.device))[0]
        return EvalResult.of(self._over_ranks(loss).item(), int(targets)).loss

    def save(self) -> Path:
        """Write a checkpoint of the current step, and return where it will be: it goes on being written while training
        continues (`saver.wait`)."""
        state = TrainerState(
            self.step,
            self.position,
            self.tokens,
            self.balance.state(),
            self.train_data.identity(),
            self.config.model_dump(mode="json"),
            self.model_config.to_dict(),
        )
        entries, keep = self.optimizer.entries(), self.config.checkpoint.keep
        return self.saver.save(self.run_dir, entries, state, keep, self.mesh)

    def save_final(self) -> Path:
        """Write run_dir/final: the trained model as a Hugging Face directory. Signals wait until it is there."""
        with Signals(), self.mesh.watchdog.paused():
            return save_distributed(self.mesh, self.chunks, self.run_dir / "final", tokenizer_from=self.source)

    def _check_finite(self, row: Row) -> None:
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise RunError(
                f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}: diverged; lower "
                f"optimizer.lr or raise schedule.warmup_steps (checkpoints are in {self.run_dir / 'checkpoints'})"
            )


def _due(step: int, every: int, first: bool = False) -> bool:
    return every > 0 and (step % every == 0 or (first and step == 1))
