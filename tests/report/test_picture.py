"""The PNG overview."""

from __future__ import annotations

import pytest

from moeforge.errors import UserError
from moeforge.report import figure_png, load_run


@pytest.mark.parametrize(("experts", "size"), [(4, (2400, 1040)), (None, (1600, 1040))])
def test_png_is_written_whole(fake_run, tmp_path, experts, size):
    out = tmp_path / "overview.png"
    figure_png(load_run(fake_run(steps=30, layers=4, experts=experts)), out)
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == size
    assert {entry.name for entry in tmp_path.iterdir()} == {"overview.png", "run"}


def test_png_of_a_run_without_similarity(fake_run, tmp_path):
    assert figure_png(fake_run(steps=2, layers=2, similarity_every=0), tmp_path / "o.png").stat().st_size > 10_000


def test_png_needs_a_directory(fake_run, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        figure_png(fake_run(steps=2, layers=2), tmp_path / "no" / "o.png")
