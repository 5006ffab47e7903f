"""The package as others meet it: a wheel built and installed elsewhere, a help page that is there at once."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "datasets", "gguf", "safetensors", "numpy", "matplotlib"}
EDGE_ONLY = ("pydantic", "transformers", "datasets", "gguf", "typer", "rich")
LIGHT = ["moeforge.errors", "moeforge.partition", "moeforge.layout", "moeforge.config.model"]
TORCH_ONLY = [*LIGHT, "moeforge.kernels", "moeforge.model"]


def _python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, nothing built."""
    tree = tmp_path_factory.mktemp("package") / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so"))
    return tree


def _build(tree: Path, kind: str, dist: Path, **environment: str) -> Path:
    arguments = ("-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(dist), str(tree))
    built = _python(*arguments, cwd=tree.parent, **environment)
    assert built.returncode == 0, built.stdout + built.stderr
    (package,) = dist.glob("moeforge-*")
    return package


@pytest.fixture(scope="module")
def installed(tree: Path) -> Path:
    """The wheel, built from the copy and installed, alone, into a folder of its own."""
    quick = tree.parent / "g++"
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')  # the library is only found here, and loaded
    quick.chmod(0o755)
    compiler = {"CC": str(quick), "CXX": str(quick)}
    wheel, target = _build(tree, "wheel", tree.parent / "dist", **compiler), tree.parent / "site"
    arguments = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(target))
    placed = _python("-m", "pip", "install", *arguments, str(wheel), cwd=tree.parent)
    assert placed.returncode == 0, placed.stderr
    return target


NAME = "from moeforge.kernels import native; print(native.name())"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_the_wheel_carries_the_native_library(installed: Path, tmp_path: Path) -> None:
    name = _python("-c", NAME, cwd=tmp_path, PYTHONPATH=str(installed))
    assert name.stdout.strip() in ("avx512", "avx2", "portable"), name.stderr
    off = _python("-c", NAME, cwd=tmp_path, PYTHONPATH=str(installed), MOEFORGE_NATIVE="0")
    assert off.stdout.strip() == "None", off.stderr


def test_without_a_compiler_the_package_is_built_all_the_same(tree: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    wheel = _build(copy, "wheel", tmp_path / "dist", CC="false", CXX="false")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
    assert "moeforge/kernels/native.py" in names and not any(name.endswith(".so") for name in names)


def test_the_source_archive_can_be_compiled(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(_build(tree, "sdist", tmp_path)) as files:
        held = {Path(name).name for name in files.getnames() if "/csrc/" in name}
    assert held == {path.name for path in (ROOT / "csrc").iterdir()}


def test_wheel_runs_without_the_source_tree(installed: Path, tmp_path: Path) -> None:
    where = _python("-c", "import moeforge; print(moeforge.__file__)", cwd=tmp_path, PYTHONPATH=str(installed))
    assert where.stdout.strip() == str(installed / "moeforge" / "__init__.py")
    version = _python("-m", "moeforge", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    (info,) = installed.glob("moeforge-*.dist-info")
    assert version.stdout.split() == ["moeforge", info.name.split("-")[1].removesuffix(".dist")]
    shown = _python("-m", "moeforge", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert shown.returncode == 0 and "Usage: moeforge" in shown.stdout


def test_wheel_is_complete(installed: Path) -> None:
    def files(root: Path) -> set[str]:
        kept = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path.relative_to(root)) for path in kept}

    assert files(installed / "moeforge") == files(ROOT / "src" / "moeforge")
    (info,) = installed.glob("moeforge-*.dist-info")
    assert "Apache License" in next(info.rglob("LICENSE")).read_text()
    assert "moeforge = moeforge.cli.app:main" in (info / "entry_points.txt").read_text()


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["train", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from moeforge.cli.app import main; code = main(sys.argv[1:]); "
        "print('MODULES', *sorted(name for name in sys.modules if '.' not in name)); sys.exit(code)"
    )
    done = _python("-c", program, *arguments)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split("MODULES")[1].split())
    assert not loaded & HEAVY
    if arguments == ["--help"]:
        assert "pydantic" not in loaded and "rich" not in loaded


def test_help_is_there_at_once() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert _python("-m", "moeforge", "--help").returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize(
    ("modules", "missing"),
    [(LIGHT, (*EDGE_ONLY, "torch")), (TORCH_ONLY, EDGE_ONLY)],
    ids=["no torch", "torch only"],
)
def test_rooms_import_without_optional_packages(modules: list[str], missing: tuple[str, ...]) -> None:
    there = [name for name in modules if importlib.util.find_spec(name)]
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in missing)
    done = _python("-c", f"import sys; {blocked}; import {', '.join(there)}")
    assert done.returncode == 0, done.stderr


def test_constraints_pin_what_the_package_needs() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^+]+", line) for line in lines)
    pinned = {_normal(line.split("==")[0]) for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    needed = {_normal(re.split(r"[<>=!\[; ]", entry)[0]) for group in groups for entry in group}
    assert needed <= pinned
    assert "torch==2.13.0" in lines


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
