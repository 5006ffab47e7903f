"""The page: complete, self-contained, escaped, and saying what the rows say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moeforge.errors import UserError
from moeforge.report import write_report
from moeforge.report.page import render_page
from moeforge.report.runs import load_run
from moeforge.report.series import MAX_POINTS

VOID = {"meta", "link", "br", "img", "input", "hr"}
TRAINING = ["loss", "lr", "grad_norm", "tokens_per_second"]
ROUTING = [
    "drop_rate",
    "aux_coef",
    "load_max_over_mean",
    "load",
    "gate_distribution",
    "max1_over_max2",
    "max2_over_max3",
    "expert_similarity",
]


class Page(HTMLParser):
    """Elements, ids, text and attributes of a page; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.figures: dict[str, dict[str, object]] = {}
        self.cells: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags[tag] += 1
        self.ids[attributes.get("id", "")] += 1
        self.links += [attributes[key] for key in ("src", "href", "xlink:href") if key in attributes]
        if tag == "figure":
            self.figures[attributes["id"]] = {}
        if tag in ("td", "dd"):
            self.cells.append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "script" in self.stack and "figure" in self.stack:
            self.figures[list(self.figures)[-1]] = json.loads(data)
        elif "script" not in self.stack and "style" not in self.stack:
            self.text += data
            if self.stack and self.stack[-1] in ("td", "dd"):
                self.cells[-1] += data


def page_of(*paths: Path) -> tuple[str, Page]:
    html = render_page([load_run(path) for path in paths])
    return html, Page(html)


def test_every_panel_is_there(fake_run):
    _, page = page_of(fake_run(steps=60, layers=4))
    assert list(page.figures) == TRAINING + ROUTING
    assert all(hover["axes"] for hover in page.figures.values())
    assert page.tags["svg"] == len(page.figures)
    for name in ("drop_rate", "aux_coef", "max1_over_max2", "max2_over_max3", "expert_similarity"):
        labels = [series["label"] for series in page.figures[name]["axes"][0]["series"]]
        assert labels == ["layer 0", "layer 1", "layer 2", "layer 3"]
    assert len(page.figures["gate_distribution"]["axes"]) == 3  # first, middle and last layer


def test_nothing_is_loaded_from_elsewhere(fake_run):
    html, page = page_of(fake_run("a", steps=60, layers=4), fake_run("b", steps=30, experts=None))
    assert not re.search(r"https?:|@import|//cdn", html)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert page.tags["img"] == page.tags["iframe"] == 0
    targets = [link[1:] for link in page.links if link.startswith("#")]
    targets += re.findall(r"url\(#([^)]+)\)", html)
    assert targets and all(page.ids[target] == 1 for target in targets)
    assert [name for name, count in page.ids.items() if name and count > 1] == []


def test_charts_follow_the_theme(fake_run):
    html, _ = page_of(fake_run(steps=30, layers=4))
    svgs = re.findall(r"<svg.*?</svg>", html, re.S)
    used = set(re.findall(r"#[0-9a-f]{6}\b", " ".join(re.sub(r'"data:[^"]*"', "", svg) for svg in svgs)))
    assert used == set()
    variables = set(re.findall(r"var\(--([\w-]+)\)", " ".join(svgs)))
    light, dark = html.split("prefers-color-scheme: dark", 1)
    assert {"ink", "muted", "grid"} <= variables
    assert all(f"--{name}:" in light and f"--{name}:" in dark for name in variables)


def test_drawn_lines_carry_the_values(fake_run):
    """The pixels of a path turn back into the row's numbers (that is what the hover script does)."""
    path = fake_run(steps=30, layers=2)
    html, page = page_of(path)
    run = load_run(path)
    area = page.figures["aux_coef"]["axes"][0]
    match = re.search(rf'id="{area["series"][1]["id"]}".*? d="([^"]*)"', html)
    points = np.array([[float(v) for v in pair] for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", match[1])])
    left, top, width, height = area["box"]
    x = area["x"][0] + (points[:, 0] - left) / width * (area["x"][1] - area["x"][0])
    y = area["y"][0] + (top + height - points[:, 1]) / height * (area["y"][1] - area["y"][0])
    np.testing.assert_allclose(x, run["step"][1:], atol=0.01)
    np.testing.assert_allclose(y, run.by_layer["aux_coef"][1:, 1], atol=1e-5)


def test_summary_and_table_have_the_numbers(fake_run):
    path = fake_run(steps=100, layers=3)
    result = write_report([path])
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    (summary,) = result["runs"]
    assert summary["eval_loss_before"] == 2.94 and summary["eval_loss_after"] == rows[-1]["eval_loss"]
    assert summary["loss_window_steps"] == 10
    assert summary["loss_before"] == pytest.approx(np.mean([row["loss"] for row in rows[1:11]]))
    assert summary["loss_after"] == pytest.approx(np.mean([row["loss"] for row in rows[-10:]]))
    drops = [[layer["drop_rate"] for layer in row["moe"]] for row in rows[-10:]]
    assert summary["drop_rate"] == pytest.approx(np.mean(drops), rel=1e-6)
    alphas = [layer["aux_coef"] for row in rows for layer in row.get("moe", [])]
    assert summary["aux_coef_min"] == pytest.approx(min(alphas), rel=1e-6)
    assert summary["aux_coef_max"] == pytest.approx(max(alphas), rel=1e-6)
    assert summary["seconds"] == pytest.approx(sum(row.get("seconds", 0) for row in rows))
    assert (summary["tokens"], summary["steps"]) == (102400, 100)
    assert (summary["experts"], summary["top_k"], summary["gate_norm"]) == (4, 2, 1.0)
    html = Path(result["report"]).read_text()
    page = Page(html)
    assert result["report"] == str(path / "report.html") and result["bytes"] == len(html.encode())
    assert f"2.940 → {rows[-1]['eval_loss']:.3f}" in page.cells
    assert "102k tokens" in page.cells and "4, top-2" in page.cells
    for layer in rows[-1]["moe"]:
        assert f"{layer['max1_over_max2']:.4g}" in page.cells
        assert f"{layer['expert_similarity']:.4g}" in page.cells


def test_strings_from_runs_are_escaped(fake_run):
    path = fake_run("a<b>&'\"c", steps=5, layers=2)
    (path / "config.toml").write_text('dir = "</pre><script>alert(1)</script>"')
    html, page = page_of(path, fake_run("plain", steps=5, layers=2))
    assert "<b>&" not in html and "<script>alert" not in html
    assert '</pre><script>alert(1)</script>"' in page.text
    assert "a<b>&'\"c" in page.text
    assert "a<b>&'\"c train" in [series["label"] for series in page.figures["loss"]["axes"][0]["series"]]


def test_dense_run(fake_run):
    _, page = page_of(fake_run(steps=30, experts=None))
    assert list(page.figures) == TRAINING
    assert "no router" in page.text and "dense" in page.cells


@pytest.mark.parametrize("experts", [None, 8])
def test_single_row(fake_run, experts):
    path = fake_run(steps=1, layers=3, experts=experts)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text(lines[1])
    _, page = page_of(path)
    assert list(page.figures) == TRAINING + (ROUTING if experts else [])


def test_only_the_first_evaluation(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "tokens": 0, "eval_loss": 2.5}\n')
    _, page = page_of(tmp_path)
    assert "2.500" in page.cells and page.text.count("Not recorded.") == 3


def test_nan_values(fake_run):
    path = fake_run(steps=60, layers=3)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows[20:25]:
        row["loss"] = row["grad_norm"] = float("nan")
        for layer in row["moe"]:
            layer["drop_rate"] = float("nan")
    rows[-1]["loss"] = float("inf")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html, page = page_of(path)
    assert list(page.figures) == TRAINING + ROUTING
    assert not re.search(r' d="[^"]*(nan|inf)', html)
    assert "not a finite number at 6 step(s), first at step 20." in page.text
    assert all(np.isfinite(hover["axes"][0]["y"]).all() for hover in page.figures.values())


def test_what_was_not_recorded_is_said(fake_run):
    _, page = page_of(fake_run(steps=10, layers=2, similarity_every=0, gate_every=0))
    assert list(page.figures) == TRAINING + ROUTING
    assert "Not recorded (run.similarity_every)." in page.text
    assert "run.gate_distribution_every" in page.text


def test_gate_without_normalisation_is_one_line(fake_run):
    _, page = page_of(fake_run(steps=60, layers=2, gate_norm=None))
    labels = [series["label"] for series in page.figures["gate_distribution"]["axes"][0]["series"]]
    assert labels == ["gate, step 1", "gate, step 50"]


def test_comparison_of_different_lengths(fake_run):
    paths = [
        fake_run("normed", steps=60, layers=3),
        fake_run("plain", steps=40, layers=2, gate_norm=None),
        fake_run("dense", steps=20, experts=None),
    ]
    _, page = page_of(*paths)
    loss = page.figures["loss"]["axes"][0]
    assert loss["xname"] == "step" and loss["x"] == [0, 60]
    assert [s["label"] for s in loss["series"]][::2] == ["normed train", "plain train", "dense train"]
    assert len({s["color"] for s in loss["series"]}) == 3
    assert [s["label"] for s in page.figures["mean-drop_rate"]["axes"][0]["series"]] == ["normed", "plain"]
    assert "run0-drop_rate" in page.figures and "run1-drop_rate" in page.figures
    assert "run2-drop_rate" not in page.figures
    assert page.tags["article"] == 3 and page.tags["table"] == 3


def test_runs_of_other_batch_sizes_are_compared_by_tokens(fake_run):
    _, page = page_of(fake_run("a", steps=20, layers=2), fake_run("b", steps=20, layers=2, tokens_per_step=4096))
    assert page.figures["loss"]["axes"][0]["xname"] == "tokens"


def test_many_layers_experts_and_steps_stay_small(fake_run):
    path = fake_run(steps=60, layers=52, experts=64)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    with (path / "metrics.jsonl").open("a") as file:
        for step in range(61, MAX_POINTS + 500):
            file.write(json.dumps({"step": step, "tokens": step, "loss": 9.5 if step == 1000 else 2.0}) + "\n")
    html, page = page_of(path)
    assert len(lines) == 61 and len(html) < 3e6
    assert "thinned to 2,000 points" in page.text
    assert page.figures["loss"]["axes"][0]["y"][1] > 9.5  # the spike survives
    assert np.shape(page.figures["load"]["cells"]["values"]) == (52, 64)


def test_notes_are_shown(fake_run):
    path = fake_run(steps=5, layers=2)
    (path / "metrics.jsonl").write_text((path / "metrics.jsonl").read_text()[:-10])
    _, page = page_of(path)
    assert "incomplete and was ignored" in page.text


def test_bad_input_is_one_line(fake_run, tmp_path):
    path = fake_run(steps=2, layers=2)
    for runs, out, words in [
        ([], None, "no run given"),
        ([path, path], None, "given twice"),
        ([path / "nowhere"], None, "not a directory"),
        ([path], tmp_path, "is a directory"),
        ([path], tmp_path / "no" / "such.html", "does not exist"),
    ]:
        with pytest.raises(UserError, match=words):
            write_report(runs, out)
    assert not list(tmp_path.glob("**/*.html"))


def test_missing_matplotlib_says_how_to_install_it(fake_run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"moeforge\[report\]"):
        write_report([fake_run(steps=2, layers=2)])


def test_out_is_replaced_whole(fake_run, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("old")
    result = write_report([fake_run(steps=2, layers=2)], out)
    assert result["report"] == str(out) and out.read_text().startswith("<!doctype html>")
    assert {entry.name for entry in tmp_path.iterdir()} == {"page.html", "run"}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_page_runs_in_a_browser(fake_run, tmp_path):
    """No script error, and pointing at a chart shows the value below the pointer."""
    html, _ = page_of(fake_run(steps=30, layers=3))
    catch = "<script>onerror = (text) => document.title = 'ERROR ' + text;</script>"
    point = """<script>
    for (const name of ["loss", "drop_rate", "load"]) {
      const chart = document.querySelector("#" + name + " .chart"), box = chart.getBoundingClientRect();
      const at = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
      chart.dispatchEvent(new PointerEvent("pointermove", at));
      document.body.append(Object.assign(document.createElement("q"), { textContent: tip.textContent }));
    }</script>"""
    file = tmp_path / "probe.html"
    file.write_text(html.replace("<head>", f"<head>{catch}").replace("</body>", f"{point}</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "ERROR" not in re.search(r"<title>(.*?)</title>", dom, re.S)[1]
    loss, drop, load = re.findall(r"<q>(.*?)</q>", dom)
    assert re.fullmatch(r"step1\drun train[\d.]+run held-out[\d.]+", loss)
    assert re.fullmatch(r"step1\dlayer \d[\d.e-]+", drop)
    assert re.fullmatch(r"layer 1, expert \dload[\d.]+ × even", load)
