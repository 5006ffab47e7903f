from moeforge.data import python_corpus, python_source


def test_same_on_every_call_and_labelled() -> None:
    documents, labels = python_corpus(200_000)
    assert (documents, labels) == python_corpus(200_000)
    assert len(documents) == len(labels) == len(set(labels))
    topics = [label for label in labels if label.startswith("topic ")]
    modules = [label for label in labels if label.startswith("module ")]
    assert labels == sorted(topics) + sorted(modules)
    assert "topic lambda" in topics and len(modules) > 3
    assert all(documents)


def test_limit_and_what_is_left_out() -> None:
    small, large = (python_corpus(limit) for limit in (100_000, 400_000))
    sizes = [
        sum(len(text) for text, label in zip(*corpus, strict=True) if label.startswith("module "))
        for corpus in (small, large)
    ]
    assert 0 < sizes[0] <= 100_000 < sizes[1] <= 400_000
    assert set(small[1]) <= set(large[1])
    assert not any("/test/" in label or "site-packages" in label for label in python_corpus()[1])


def test_as_a_source() -> None:
    source = python_source(50_000)
    assert source.path == "python" and len(source.documents) > 50
