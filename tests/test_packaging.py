"""What a user gets: a wheel built here, without the network, from a copy of the tree."""

from __future__ import annotations

import configparser
import email
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from semseg_automl.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted(path.name for path in (ROOT / "presets").glob("*.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The project's wheel. Built from a copy: setuptools leaves build/ and *.egg-info where it runs."""
    tree = tmp_path_factory.mktemp("tree")
    out = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("semseg_automl", "presets"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=150, check=False
    )
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def requirements(wheel: zipfile.ZipFile) -> list[Requirement]:
    return [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist", [])]


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(entry.name): entry for entry in entries}


def test_wheel__presets__are_inside_byte_for_byte(wheel: zipfile.ZipFile) -> None:
    assert PRESETS, "presets/ holds no *.yaml"
    inside = [n for n in wheel.namelist() if n.startswith("semseg_automl/presets/")]
    assert sorted(inside) == [f"semseg_automl/presets/{name}" for name in PRESETS]
    for name in PRESETS:
        assert wheel.read(f"semseg_automl/presets/{name}") == (ROOT / "presets" / name).read_bytes()


def test_wheel__package__is_whole_and_typed_and_alone(wheel: zipfile.ZipFile) -> None:
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "semseg_automl").rglob("*.py")}
    names = set(wheel.namelist())
    assert sources - names == set()
    assert "semseg_automl/py.typed" in names
    page = "semseg_automl/report_page.html"
    assert wheel.read(page) == (ROOT / page).read_bytes()
    assert {name.partition("/")[0] for name in names} == {
        "semseg_automl",
        f"semseg_automl-{__version__}.dist-info",
    }


def test_wheel__command__leads_to_a_function(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    points = configparser.ConfigParser()
    points.read_string(wheel.read(name).decode())
    assert dict(points["console_scripts"]) == {"semseg-automl": "semseg_automl.cli:main"}
    source = wheel.read("semseg_automl/cli.py").decode()
    assert re.search(r"^(def main\(|main\b.*=)", source, flags=re.MULTILINE)


def test_metadata__version__is_that_of_the_package(wheel: zipfile.ZipFile) -> None:
    assert metadata(wheel)["Version"] == __version__
    assert metadata(wheel)["Requires-Python"] == ">=3.11"


def test_metadata__torch_and_torchvision__keep_their_ranges(wheel: zipfile.ZipFile) -> None:
    bounds = {r.name: str(r.specifier) for r in requirements(wheel)}
    assert bounds["torch"] == "<2.14,>=2.10"
    assert bounds["torchvision"] == "<0.29,>=0.25"


def test_metadata__every_requirement__has_a_bound(wheel: zipfile.ZipFile) -> None:
    assert [str(r) for r in requirements(wheel) if not r.specifier] == []


def test_constraints__every_requirement__is_pinned_within_its_bounds(wheel: zipfile.ZipFile) -> None:
    pinned = constraints()
    for requirement in requirements(wheel):
        entry = pinned[canonicalize_name(requirement.name)]
        if entry.name in ("torch", "torchvision"):
            assert entry.specifier == requirement.specifier
            continue
        (pin,) = entry.specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version, prereleases=True), (
            f"{entry} is not in {requirement}"
        )
