"""Stop strings in pieces of text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moeforge.serve.stop_strings import StopStrings

TEXT = st.text("ab ", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def first_complete(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What is before the stop string that is complete first, and that string."""
    for end in range(1, len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(TEXT, STOPS, st.data())
def test_pieces_change_nothing(text: str, stops: list[str], data: st.DataObject) -> None:
    finder = StopStrings(stops)
    expected = first_complete(text, stops)
    seen, rest = "", text
    while rest:
        piece = rest[: data.draw(st.integers(1, 6))]
        rest = rest[len(piece) :]
        certain, stop = finder.append(piece)
        seen += certain
        assert expected[0].startswith(seen)
        if stop is not None:
            assert (seen, stop) == expected
            return
        taken = text[: len(text) - len(rest)]
        held = max((n for s in stops for n in range(1, len(s)) if taken.endswith(s[:n])), default=0)
        assert seen == taken[: len(taken) - held]  # no more is held back than may begin a stop string
    assert (seen + finder.flush(), None) == expected


@given(TEXT, TEXT, STOPS)
def test_ignored_text_counts_only_as_the_beginning(ignored: str, text: str, stops: list[str]) -> None:
    finder = StopStrings(stops)
    seen, stop = finder.append(ignored, ignore=True)
    assert stop is None
    more, stop = finder.append(text)
    expected: tuple[str, str | None] = ignored + text, None
    for end in range(len(ignored) + 1, len(ignored + text) + 1):
        if complete := [s for s in stops if (ignored + text)[:end].endswith(s)]:
            expected = (ignored + text)[: end - len(max(complete, key=len))], max(complete, key=len)
            break
    assert (seen + more + (finder.flush() if stop is None else ""), stop) == expected


def test_no_strings() -> None:
    finder = StopStrings(())
    assert finder.append("abc") == ("abc", None)
    assert finder.flush() == ""
