from __future__ import annotations

import torch

from moeforge.model import RouterRecord
from moeforge.model.record import SCALARS


def make(distributions: bool = False) -> RouterRecord:
    return RouterRecord((1, 3), 4, 3, torch.tensor([0.1, 0.2]), 100, distributions=distributions)


def scalars(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value + i) for i, name in enumerate(SCALARS)}


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_assigning_again_changes_nothing() -> None:
    record = make()
    for _ in range(2):
        record.assign(3, 1, scalars(2.0), vector(1, 2, 3, 4), vector(0.1, 0.2, 0.3, 0.4))
    totals = record.totals()
    assert totals["tokens"].tolist() == [0, 2] and totals["max2_over_max3"].tolist() == [0, 8]
    assert totals["load"].tolist() == [[0] * 4, [1, 2, 3, 4]]
    assert totals["probability"].tolist() == [[0] * 4, [0.1, 0.2, 0.3, 0.4]]
    assert set(totals) == {*SCALARS, "load", "probability"}


def test_totals_sum_micro_batches_and_load_before_only_the_earlier_ones() -> None:
    record = make()
    for m in range(3):
        record.assign(1, m, scalars(m), vector(m, 1, 0, 10 * m), vector(0, 0, 0, 0))
    assert record.totals()["tokens"].tolist() == [3, 0]
    assert record.totals()["load"][0].tolist() == [3, 3, 0, 30]
    assert record.load_before(1, 0).tolist() == [0, 0, 0, 0]
    assert record.load_before(1, 2).tolist() == [1, 2, 0, 10]
    assert record.load_before(3, 2).tolist() == [0, 0, 0, 0]


def test_distributions_have_their_columns() -> None:
    record = make(distributions=True)
    record.assign(1, 0, scalars(1.0), *(vector(*[float(i)] * 4) for i in range(4)))
    totals = record.totals()
    names = ("load", "probability", "sorted", "sorted_unnormalised")
    assert [totals[name][0, 0].item() for name in names] == [0, 1, 2, 3]


def test_alpha_by_layer_number() -> None:
    assert torch.equal(make().alpha_of(3), torch.tensor(0.2))
