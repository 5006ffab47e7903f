from pathlib import Path
from types import SimpleNamespace

import pytest

from moeforge.data.source import Source, corpus_files, is_hub_id
from moeforge.errors import UserError


def test_takes_any_object_with_its_attributes() -> None:
    entry = SimpleNamespace(path="a.txt", weight=2.0, format="text", text_field="body", messages_field=None, split="x")
    assert Source.of(entry) == Source("a.txt", 2.0, "text", "body", None, "x")


def test_documents_of_a_one_shot_iterator_are_kept() -> None:
    source = Source("memory", documents=(text for text in ["a", "b"]))
    assert source.documents == ("a", "b")
    assert corpus_files(source) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "csv"}, "allowed are auto, text"),
        ({"weight": -1.0}, "0 or more"),
        ({"weight": float("nan")}, "nan"),
    ],
)
def test_refuses_what_it_does_not_know(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Source("a.txt", **options)


def test_directory_gives_known_files_sorted_and_by_suffix(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "sub/c.parquet", "sub/d.jsonl.gz", "picture.png", ".git/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [(file.path.name, file.format) for file in corpus_files(Source(str(tmp_path)))]
    assert found == [
        ("a.txt", "text"),
        ("b.jsonl", "jsonl"),
        ("c.parquet", "parquet"),
        ("d.jsonl.gz", "jsonl"),
    ]


def test_explicit_format_takes_all_files_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a.py").touch()
    (tmp_path / "b").touch()
    found = [file.path.name for file in corpus_files(Source(str(tmp_path), format="text"))]
    assert found == ["a.py", "b"]


def test_glob(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b.txt"):
        (tmp_path / name).touch()
    assert [f.path.name for f in corpus_files(Source(str(tmp_path / "a*.txt")))] == ["a1.txt", "a2.txt"]


@pytest.mark.parametrize("path", ["gone.txt", "no/such/dir", "./corpus/train", "*.txt"])
def test_missing_path_is_named(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file") as caught:
        corpus_files(Source(path))
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_directory_without_a_known_file(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    with pytest.raises(UserError, match="holds no file of a known format"):
        corpus_files(Source(str(tmp_path)))


def test_file_whose_name_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "corpus").touch()
    with pytest.raises(UserError, match="set format to text, jsonl or parquet"):
        corpus_files(Source(str(tmp_path / "corpus")))


def test_hub_ids() -> None:
    assert is_hub_id("HuggingFaceTB/smollm-corpus:cosmopedia-v2")
    assert is_hub_id("owner/name@refs/convert/parquet")
    assert not is_hub_id("data/train.jsonl")
    assert not is_hub_id("one/two/three")
