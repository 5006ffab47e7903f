"""The sweep picture, its lines read back from the SVG."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from moeforge.errors import UserError
from moeforge.report.sweep import draw_sweep

SVG = "{http://www.w3.org/2000/svg}"
ROWS = [
    {
        "devices": devices,
        "tokens_per_second_per_gpu": 4000.0 - devices,
        "uniform_tokens_per_second_per_gpu": 3600.0 - devices,
        "mfu": 0.4 - devices / 4096,
        "bubble_fraction": devices / 2048,
        "peak_memory_bytes": 60 * 2.0**30,
        "memory_cap_bytes": 72 * 2.0**30,
    }
    for devices in (256, 64, 128, 512)
]


def lines(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Points of every line, in points from the top left."""
    found = {}
    for group in ET.parse(path).iter(f"{SVG}g"):
        if re.fullmatch(r"[a-z-]+", group.get("id", "")) and (path_ := group.find(f"{SVG}path")) is not None:
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", path_.get("d"))]
            found[group.get("id")] = list(zip(numbers[::2], numbers[1::2], strict=True))
    return found


def texts(path: Path) -> list[str]:
    return ["".join(text.itertext()) for text in ET.parse(path).iter(f"{SVG}text")]


def test_lines_show_the_rows_by_device_count(tmp_path: Path) -> None:
    out = tmp_path / "sweep.svg"
    draw_sweep(ROWS, out)
    found = lines(out)
    assert found.keys() == {key.replace("_", "-") for key in ROWS[0]} - {"devices"}
    for points in found.values():
        xs = [x for x, _ in points]
        assert xs == sorted(xs)
    xs = [x for x, _ in found["mfu"]]
    steps = [after - before for before, after in zip(xs, xs[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 3, rel=1e-3)  # every doubling is as wide
    planned, uniform = found["tokens-per-second-per-gpu"], found["uniform-tokens-per-second-per-gpu"]
    gaps = [low - high for (_, high), (_, low) in zip(planned, uniform, strict=True)]
    assert gaps == pytest.approx([gaps[0]] * 4, rel=1e-3) and gaps[0] > 0  # 400 tokens a second faster throughout
    assert [y for _, y in found["mfu"]] == sorted(y for _, y in found["mfu"])  # it falls
    assert {"64", "128", "256", "512", "planned", "even stages", "limit"} <= set(texts(out))
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.svg"]


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    out = tmp_path / "sweep.svg"
    rows = [{**row, "mfu": None, "memory_cap_bytes": None} for row in ROWS]
    rows[2]["tokens_per_second_per_gpu"] = None
    del rows[0]["bubble_fraction"]
    draw_sweep(rows, out)
    found = lines(out)
    assert "mfu" not in found and "memory-cap-bytes" not in found
    assert "not known" in texts(out) and "limit" not in texts(out)
    assert len(found["tokens-per-second-per-gpu"]) == len(found["bubble-fraction"]) == 3


def test_one_row_and_png(tmp_path: Path) -> None:
    draw_sweep(ROWS[:1], tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("rows", "name"), [(ROWS, "sweep.jpg"), (ROWS, "no/sweep.svg"), ([], "sweep.svg")])
def test_what_cannot_be_drawn_is_refused_and_leaves_nothing(tmp_path: Path, rows: list, name: str) -> None:
    with pytest.raises(UserError, match=r"must end in \.svg or \.png|does not exist|no rows"):
        draw_sweep(rows, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
