"""One JSON and one table of what the stages of the GPU benchmark found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def merge(folder: Path, stages: Sequence[str]) -> dict[str, Any]:
    """The stages' files; one that was never written counts as not finished."""
    found = []
    for stage in stages:
        path = folder / f"{stage}.json"
        if path.exists():
            found.append(json.loads(path.read_text()))
        else:
            found.append({"stage": stage, "finished": False, "cases": []})
    machine: dict[str, Any] = next((stage["machine"] for stage in found if "machine" in stage), {})
    return {"machine": machine, "goals": goals(found) if "gpu" in machine else [], "stages": found}


def goals(stages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, and the worst that was measured; None where nothing was."""
    cases = {case["case"]: case for stage in stages for case in stage["cases"]}

    def of(prefix: str, *keys: str) -> dict[str, list[Any]]:
        return {name: list(_find(case, keys)) for name, case in cases.items() if name.startswith(prefix)}

    def each(prefix: str, what: str, goal: float, *keys: str, most: bool = False) -> Iterator[dict[str, Any]]:
        for name, values in (of(prefix, *keys) or {prefix: []}).items():
            yield _goal(f"{name}: {what}", goal, values, most)

    waits = [value for values in of("Skywork-MoE", "host_synchronisations").values() for value in values]
    peer = "transformers" if any(of("routed", "speedup_over", "transformers").values()) else "grouped_mm"
    return [
        *each("grouped matmuls", "share of the dense rate", 0.8, "share_of_ceiling"),
        *each("routed experts", f"over {peer}", 1.1, "speedup_over", peer),
        *each("FP8 experts in decoding", "share of a copy", 0.75, "fp8_share_of_copy"),
        *each("MoE block", "over transformers'", 1.3, "speedup_over", "transformers"),
        *each("MoE block", "share of routing", 0.05, "routing_share", most=True),
        {
            "what": "host synchronisations of a decode step",
            "goal": "none",
            "worst": next((each for each in waits if each != "none"), "none") if waits else None,
            "met": all(each == "none" for each in waits) if waits else None,
        },
    ]


def _goal(what: str, goal: float, found: Sequence[float], most: bool = False) -> dict[str, Any]:
    worst = (max(found) if most else min(found)) if found else None
    met = None if worst is None else worst <= goal if most else worst >= goal
    return {"what": what, "goal": goal, "worst": worst, "met": met}


def _find(value: Any, keys: Sequence[str]) -> Iterator[Any]:
    """All values under these keys, which follow one another at any depth."""
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        if key != keys[0]:
            yield from _find(inner, keys)
        elif len(keys) > 1:
            yield from _find(inner, keys[1:])
        elif inner is not None:
            yield inner


def table(merged: dict[str, Any]) -> str:
    """What `merge` returned, as text for a terminal."""
    lines = [", ".join(f"{key} {shown(value)}" for key, value in merged["machine"].items()), ""]
    for stage in merged["stages"]:
        lines.append(stage["stage"] + ("" if stage["finished"] else ": stopped before its end"))
        for case in stage["cases"]:
            lines.append(f"  {case['case']} ({case['seconds']:.0f} s)")
            for name, value in flat(case):
                lines.append(f"    {name:<58} {shown(value)}")
    lines.append("")
    for goal in merged["goals"]:
        met = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
        lines.append(f"{goal['what']:<62} {shown(goal['worst']):>12}  goal {goal['goal']}: {met}")
    return "\n".join(lines)


def flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A case's numbers, those of inner mappings under all their keys."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from flat(inner, f"{prefix}{key}, ")
        elif prefix or key not in ("case", "seconds"):
            yield prefix + key, inner


def shown(value: Any) -> str:
    """A number to four digits; of a longer text its last line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    lines = str(value).strip().splitlines() or [""]
    return lines[-1][:150]
