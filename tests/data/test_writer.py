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
    first, second = one.close(), two.close()
    assert first.pop("content") != second.pop("content")
    assert first == {"tokens": 26, "documents": 3, "loss_tokens": int(loss[:21].sum() + loss[:5].sum())}
    assert second == {"tokens": 39, "documents": 2, "loss_tokens": int(loss[21:].sum())}
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


def test_content_is_tokens_documents_and_loss_and_not_their_history(tmp_path: Path) -> None:
    def content(name: str, ids: list[int], starts: list[int], loss: list[bool], cut: bool = False) -> str:
        writer = StreamWriter(tmp_path / name, np.dtype(np.uint16), chat=True)
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            writer.begin_document()
            writer.extend(np.array(ids[begin:end]), np.array(loss[begin:end]))
        if cut:
            writer.begin_document()
            writer.extend(np.arange(5), np.ones(5, bool))
            writer.move_tail(len(ids), StreamWriter(tmp_path / f"{name}-tail", np.dtype(np.uint16), chat=True))
        return str(writer.close()["content"])

    plain = content("a", [1, 2, 3, 4], [0, 2], [True, False, True, True])
    assert content("b", [1, 2, 3, 4], [0, 2], [True, False, True, True], cut=True) == plain
    others = {
        content("c", [1, 2, 3, 5], [0, 2], [True, False, True, True]),
        content("d", [1, 2, 3, 4], [0, 3], [True, False, True, True]),
        content("e", [1, 2, 3, 4], [0, 2], [True, True, True, True]),
    }
    assert len(others | {plain}) == 4
