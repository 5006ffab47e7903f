import gzip
import json
from pathlib import Path

import pytest

from moeforge.data import reading
from moeforge.data.reading import PIECE_CHARACTERS, read_pieces
from moeforge.data.source import Source
from moeforge.errors import UserError


def contents(path: Path, **options: str) -> list:
    return [piece.content for piece in read_pieces(Source(str(path), **options))]


def error(path: Path, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        contents(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Grüße\n\nzwei\n", "utf-8-sig")
    assert contents(tmp_path / "a.txt") == ["Grüße\n\nzwei\n"]


@pytest.mark.parametrize("unit", ["zwölf Wörter\n\n  und mehr\n", "wörter ohne Zeilen ", "ohnealles"])
def test_long_text_comes_in_pieces_that_join(tmp_path: Path, unit: str) -> None:
    text = unit * (3 * PIECE_CHARACTERS // len(unit))
    (tmp_path / "a.txt").write_text(text, "utf-8")
    pieces = list(read_pieces(Source(str(tmp_path / "a.txt"))))
    assert len(pieces) > 2
    assert "".join(piece.content for piece in pieces) == text
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.content) for piece in pieces) <= PIECE_CHARACTERS


def test_pieces_have_the_tokens_of_the_whole(tmp_path: Path, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 200)
    text = "def f(x):\n\n    return  x + 1\n\n\n" * 500
    (tmp_path / "a.txt").write_text(text)
    pieces = contents(tmp_path / "a.txt")
    assert len(pieces) > 50
    assert sum(tokenizer(pieces, verbose=False)["input_ids"], []) == tokenizer(text, verbose=False)["input_ids"]


@pytest.mark.parametrize("before", [5, (1 << 20) - 1, (1 << 20) + 3])
def test_other_encoding_names_the_byte(tmp_path: Path, before: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * before + "ü".encode("latin-1") + b"yz" * 10)
    assert f"not UTF-8 at byte {before}" in error(tmp_path / "a.txt")


def test_truncated_character_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc" + "ü".encode()[:1])
    assert "byte 3" in error(tmp_path / "a.txt")


def test_utf16_is_refused_at_its_first_byte(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', "utf-16")
    assert "a.jsonl" in error(tmp_path / "a.jsonl") and "byte 0" in error(tmp_path / "a.jsonl")


def test_jsonl_rows_blank_lines_null_and_compression(tmp_path: Path) -> None:
    lines = '{"text": "one", "n": 1}\n\n{"text": null}\n{"text": "two", "n": "x"}'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert contents(tmp_path / "a.jsonl.gz") == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "x"', "line 2: not JSON"),
        ('["x"]', "line 2: holds a list"),
        ('{"txet": "x", "id": 3}', "line 2: no field 'text'; fields there: id, txet; did you mean 'txet'?"),
        ('{"text": 3}', "line 2: text_field 'text' holds a int"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert error(tmp_path / "a.jsonl").startswith(str(tmp_path / "a.jsonl"))
    assert words in error(tmp_path / "a.jsonl")


def test_encoding_error_in_a_later_jsonl_line(tmp_path: Path) -> None:
    first = b'{"text": "fine"}\n'
    (tmp_path / "a.jsonl").write_bytes(first + b'{"text": "\xfc"}\n')
    assert f"byte {len(first) + 10}" in error(tmp_path / "a.jsonl")


def test_messages(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    assert contents(tmp_path / "a.jsonl", messages_field="messages") == [chat]
    (tmp_path / "b.jsonl").write_text('{"messages": "hi"}')
    assert "must hold a list of {role, content}" in error(tmp_path / "b.jsonl", messages_field="messages")
    (tmp_path / "c.txt").write_text("hi")
    assert "needs jsonl" in error(tmp_path / "c.txt", messages_field="messages")


def test_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"body": ["one", None, "two"], "id": [1, 2, 3]}), tmp_path / "a.parquet")
    assert contents(tmp_path / "a.parquet", text_field="body") == ["one", "two"]
    assert "no field 'text'; fields there: body, id" in error(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    assert "not a Parquet file" in error(tmp_path / "b.parquet", text_field="body")


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: object, **options: object) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert "the hub dataset cannot be had (split 'train': no route)" in error(Path("owner/name"))


def test_hub_id_with_configuration_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen = {}

    def load(name: str, config: str | None, **options: object) -> datasets.IterableDataset:
        seen.update(options, name=name, config=config)
        return datasets.Dataset.from_dict({"text": ["a", "b"], "x": [1, 2]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert contents(Path("owner/name:small@v2"), split="test") == ["a", "b"]
    assert seen == {
        "name": "owner/name",
        "config": "small",
        "revision": "v2",
        "split": "test",
        "streaming": True,
    }
