"""The timeline, its boxes counted and measured in the SVG."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from moeforge.errors import RunError, UserError
from moeforge.plan.simulator import Simulation, simulate
from moeforge.plan.times import UnitTime
from moeforge.report import save
from moeforge.report.timeline import draw_timeline

SVG = "{http://www.w3.org/2000/svg}"
KINDS = {"F": "forward", "B": "backward", "I": "backward-inputs", "W": "backward-weights"}


def made(schedule: str, pp: int, chunks: int, micro_batches: int, scale: float = 0.01) -> Simulation:
    stages = [UnitTime(scale, 2 * scale, 1.1 * scale, 0.9 * scale, 0.0, 3 * scale)] * (pp * chunks)
    return simulate(schedule, pp, micro_batches, stages)


def group_boxes(path: Path) -> dict[str, list[tuple[float, float, float, float]]]:
    """Of every named group: x from, x to, y from, y to of its boxes, in points."""
    found = {}
    for group in ET.parse(path).iter(f"{SVG}g"):
        name = group.get("id", "")
        if re.fullmatch(r"(waiting|forward|backward|backward-inputs|backward-weights|update)-\d+", name):
            shapes = {shape.get("id"): shape for shape in group.iter(f"{SVG}path") if shape.get("id")}
            boxes = []
            for shape in group.iter():
                path_data, dx, dy = shape.get("d"), 0.0, 0.0
                if shape.tag == f"{SVG}use":
                    path_data = shapes[shape.get("{http://www.w3.org/1999/xlink}href")[1:]].get("d")
                    dx, dy = float(shape.get("x")), float(shape.get("y"))
                elif shape.tag != f"{SVG}path" or shape.get("id"):
                    continue
                numbers = [float(number) for number in re.findall(r"-?[\d.]+", path_data)]
                xs, ys = [x + dx for x in numbers[::2]], [y + dy for y in numbers[1::2]]
                boxes.append((min(xs), max(xs), min(ys), max(ys)))
            found[name] = boxes
    return found


@pytest.mark.parametrize(
    ("schedule", "pp", "chunks", "micro_batches"),
    [
        ("1f1b", 4, 1, 8),
        ("interleaved-1f1b", 4, 3, 8),
        ("zbv", 4, 2, 8),
        ("zero-bubble", 16, 1, 128),
        ("1f1b", 1, 1, 3),
    ],
)
def test_every_event_is_a_box(tmp_path: Path, schedule: str, pp: int, chunks: int, micro_batches: int) -> None:
    simulation = made(schedule, pp, chunks, micro_batches)
    out = tmp_path / "step.svg"
    draw_timeline(simulation, out)
    groups = group_boxes(out)
    for kind, name in KINDS.items():
        wanted = sum(event.action.kind == kind for event in simulation.events)
        drawn = {group: boxes for group, boxes in groups.items() if group.rpartition("-")[0] == name}
        assert sum(map(len, drawn.values())) == wanted
        assert len(drawn) == (chunks if wanted else 0)
    assert len(groups["waiting-0"]) == len(groups["update-0"]) == pp
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.svg"]


def test_boxes_stand_where_the_events_are(tmp_path: Path) -> None:
    simulation = made("1f1b", 3, 1, 5)
    out = tmp_path / "step.svg"
    draw_timeline(simulation, out)
    groups = group_boxes(out)
    left, right = groups["waiting-0"][0][0], groups["update-0"][0][1]
    scale = (right - left) / simulation.step_seconds
    rows = sorted({box[2] for box in groups["waiting-0"]})
    drawn = sorted((rows.index(box[2]), box[0], box[1]) for name in ("forward-0", "backward-0") for box in groups[name])
    wanted = sorted((e.rank, left + e.start * scale, left + e.end * scale) for e in simulation.events)
    for box, event in zip(drawn, wanted, strict=True):
        assert box == pytest.approx(event, abs=0.02)


def texts(path: Path) -> list[str]:
    return ["".join(text.itertext()) for text in ET.parse(path).iter(f"{SVG}text")]


def test_numbers_where_they_fit(tmp_path: Path) -> None:
    out = tmp_path / "step.svg"
    draw_timeline(made("1f1b", 4, 1, 8), out, "a $title$ & more")
    found = texts(out)
    assert found.count("rank 0") == 1
    assert sum(text in set("01234567") for text in found) >= 4 * 8 * 2
    assert "a $title$ & more" in found and "ms" in found
    assert any(text.startswith("step 360 ms, bubble 27.3 %") for text in found)
    draw_timeline(made("1f1b", 16, 1, 128), out)
    found = texts(out)
    assert len(found) < 60 and "s" in found  # no numbers, and seconds


def test_memory_is_drawn_below(tmp_path: Path) -> None:
    out, without = tmp_path / "with.svg", tmp_path / "without.svg"
    simulation = made("1f1b", 2, 1, 2)
    draw_timeline(simulation, without)
    draw_timeline(simulation, out, memory=[[(0.0, 2.0**30), (0.01, 3 * 2.0**30)], [(0.0, 2.0**30)]])
    assert "activations, GiB" in texts(out) and "activations, GiB" not in texts(without)


def test_equal_steps_give_equal_files(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw_timeline(made("zbv", 2, 2, 4), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_png(tmp_path: Path) -> None:
    draw_timeline(made("1f1b", 2, 1, 2), tmp_path / "step.PNG")
    data = (tmp_path / "step.PNG").read_bytes()
    assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize("name", ["step.pdf", "step", "step.svg.gz", "no/step.svg"])
def test_a_bad_name_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"must end in \.svg or \.png|does not exist"):
        draw_timeline(made("1f1b", 2, 1, 2), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_earlier_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def full(self: Figure, path: Path, **options: object) -> None:
        path.write_bytes(b"half a pic")
        raise OSError(28, "No space left on device")

    out = tmp_path / "step.png"
    out.write_bytes(b"earlier")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(RunError, match="no space left"):
        draw_timeline(made("1f1b", 2, 1, 2), out)
    assert out.read_bytes() == b"earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.png"]
    with pytest.raises(UserError, match="cannot be written"):
        monkeypatch.undo()
        (tmp_path / "dir.svg").mkdir()
        save.save_figure(Figure(), tmp_path / "dir.svg", "svg")
    assert {entry.name for entry in tmp_path.iterdir()} == {"step.png", "dir.svg"}
