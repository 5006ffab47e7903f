"""A cluster as the planner sees it: rates, memories and links, from a preset, a TOML file or a calibration."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import Field, model_validator

from moeforge.config.model import ModelConfig
from moeforge.config.section import Count, NonNegative, Positive, Section, Share, Text, refuse

Precision = Literal["bf16", "fp32", "fp64"]


class MatmulRate(Section):
    """What a matmul of a size reaches."""

    flops: Positive = Field(description="Size of one matmul: 2 M N K.")
    tflops: Positive = Field(description="TFLOP/s that it reaches.")


class Link(Section):
    """One way between two devices."""

    gbytes_per_second: Positive = Field(
        description="Bandwidth of one device in one direction, GB/s, as collectives see it."
    )
    latency_us: NonNegative = Field(description="Microseconds that any message takes.")


class MeasuredUnit(Section):
    """Seconds of a unit, measured on one rank."""

    kind: Literal["embed", "attention", "dense ffn", "experts", "head"] = Field(description="Kind of unit.")
    forward: Positive = Field(description="Forward of one micro-batch.")
    backward: NonNegative = Field(description="Whole backward of one micro-batch, without recomputation.")
    backward_input: NonNegative = Field(description="Backward for the input alone.")
    backward_weight: NonNegative = Field(description="Backward for the weights alone.")
    recompute: NonNegative = Field(description="What recomputation adds to the backward.")
    update: NonNegative = Field(description="Optimiser update, once a step.")


class MeasuredModel(Section):
    """Times of whole units of one model at one micro-batch: where they are given, they are used instead of rates."""

    fingerprint: Text = Field(description="Of the model (layers may differ in number).")
    precision: Text = Field(description="As model.precision.")
    micro_batch_sequences: Count = Field(description="Sequences of a micro-batch.")
    sequence_length: Count = Field(description="Tokens of a sequence.")
    units: tuple[MeasuredUnit, ...] = Field(description="One for each kind of unit.")


def layer_fingerprint(model: ModelConfig) -> str:
    """What `MeasuredModel.fingerprint` holds: equal for models that differ in nothing but their number of layers."""
    return dataclasses.replace(model, num_layers=1).fingerprint()


class HardwareProfile(Section):
    """A cluster of equal nodes of equal devices."""

    name: Text = Field(description="How the profile is called.")
    nodes: Count = Field(default=1, description="Number of nodes.")
    devices_per_node: Count = Field(default=1, description="Devices of a node.")
    memory_gbytes: Positive = Field(description="Memory of a device, 10^9 bytes.")
    usable_memory: Share = Field(
        default=0.92, description="Share of it that a run may fill: the rest is for the context and fragments."
    )
    peak_tflops: dict[Precision, Positive] = Field(description="TFLOP/s of the data sheet by precision, for MFU.")
    matmul: dict[Precision, tuple[MatmulRate, ...]] = Field(
        description="Reached rates by precision, ascending in size."
    )
    memory_gbytes_per_second: Positive = Field(
        description="Memory bandwidth that elementwise passes reach (read + write)."
    )
    unit_overhead_us: NonNegative = Field(default=0.0, description="Microseconds that launching one unit's pass costs.")
    intra_node: Link = Field(description="Between devices of a node.")
    inter_node: Link = Field(description="Between nodes, for one device.")
    source: str = Field(default="", description="Where the figures come from.")
    measured: tuple[MeasuredModel, ...] = Field(default=(), description="Measured times of whole models' units.")

    @model_validator(mode="after")
    def _check(self) -> HardwareProfile:
        for precision, rates in self.matmul.items():
            sizes = [rate.flops for rate in rates]
            if not rates:
                raise refuse(f"matmul.{precision}", [], "must have at least one size")
            if sizes != sorted(set(sizes)):
                raise refuse(f"matmul.{precision}", sizes, "sizes must ascend")
            if precision not in self.peak_tflops:
                raise refuse(f"peak_tflops.{precision}", "missing", f"must be given, as matmul.{precision} is")
        if not self.usable_memory:
            raise refuse("usable_memory", self.usable_memory, "must be greater than 0")
        return self

    def __hash__(self) -> int:
        # pydantic's own hash fails on dictionaries; equal profiles are equal in these too.
        return hash((self.name, self.nodes, self.devices_per_node, self.memory_gbytes))

    @property
    def devices(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.devices_per_node

    def measured_micro_batches(self, model: ModelConfig, precision: str, sequence_length: int) -> set[int]:
        """Sequences of the micro-batches that units of this model were measured with."""
        wanted = (layer_fingerprint(model), precision, sequence_length)
        return {
            found.micro_batch_sequences
            for found in self.measured
            if (found.fingerprint, found.precision, found.sequence_length) == wanted
        }

    @property
    def usable_bytes(self) -> float:
        """Bytes of a device that a run may fill."""
        return self.memory_gbytes * 1e9 * self.usable_memory
