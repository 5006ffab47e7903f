from pathlib import Path

import numpy as np

from moeforge.data.writer import StreamWriter


def test_moving_a_tail_keeps_every_token_and_mask(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids, loss = rng.integers(0, 1000, 60), rng.random(60) < 0.4
    one, two = (StreamWriter(tmp_path / name, np.dtype(np.uint16), chat=True) for name in ("one", "two"))
    for begin, end in ((0, 10), (10, 33), (33, 60)):
        one.begin_document()
        one.extend(ids[begin:end], loss[begin:end])
    assert one.last_document() == 33
    one.move_tail(33, two)  # a whole document
    one.move_tail(21, two)  # part of one
    one.begin_document()
    one.extend(ids[:5], loss[:5])
    assert one.close() == {"tokens": 26, "documents": 3, "loss_tokens": int(loss[:21].sum() + loss[:5].sum())}
    assert two.close() == {"tokens": 39, "documents": 2, "loss_tokens": int(loss[21:].sum())}
    for name, pick, starts in (
        ("one", [*range(21), *range(5)], [0, 10, 21]),
        ("two", [*range(33, 60), *range(21, 33)], [0, 27]),
    ):
        read = {
            kind: np.fromfile(tmp_path / name / f"{kind}.bin", dtype)
            for kind, dtype in (("tokens", np.uint16), ("starts", np.int64), ("loss", np.uint8))
        }
        assert read["tokens"].tolist() == ids[pick].tolist()
        assert read["starts"].tolist() == starts
        assert np.unpackbits(read["loss"], bitorder="little")[: len(pick)].tolist() == loss[pick].tolist()
        assert not (tmp_path / name / "loss.bytes").exists()
