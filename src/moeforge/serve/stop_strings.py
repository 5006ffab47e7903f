"""Finding stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string, holding back what may be the beginning of one.

    The string that is complete first counts; of those complete at once, the longest. How the text is cut into pieces
    changes nothing. The work for a character does not grow with the text (Knuth, Morris and Pratt).
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._borders = [_borders(string) for string in strings]
        self._matched = [0] * len(strings)  # the most characters of each that the text so far ends with
        self._held = ""

    def append(self, text: str, ignore: bool = False) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that ends it. `ignore`: let strings pass that are complete
        within `text`."""
        if not self._strings:
            return text, None
        text = self._held + text
        for at in range(len(self._held), len(text)):
            complete = [s for i, s in enumerate(self._strings) if self._advance(i, text[at]) == len(s)]
            if complete and not ignore:
                stop = max(complete, key=len)
                self._held = ""
                return text[: at + 1 - len(stop)], stop
        # A complete one that passed is followed by what else it may begin.
        held = max(
            self._borders[i][-1] if matched == len(self._strings[i]) else matched
            for i, matched in enumerate(self._matched)
        )
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain], None

    def flush(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, i: int, character: str) -> int:
        string, borders, matched = self._strings[i], self._borders[i], self._matched[i]
        if matched == len(string):
            matched = borders[-1]
        while matched and string[matched] != character:
            matched = borders[matched - 1]
        if string[matched] == character:
            matched += 1
        self._matched[i] = matched
        return matched


def _borders(string: str) -> list[int]:
    """For every beginning of the string, the longest shorter beginning that it also ends with."""
    borders = [0] * len(string)
    length = 0
    for at in range(1, len(string)):
        while length and string[at] != string[length]:
            length = borders[length - 1]
        if string[at] == string[length]:
            length += 1
        borders[at] = length
    return borders
