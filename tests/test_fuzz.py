"""The fuzzing of the readers: a small run finds nothing, and each kind of fault would be found."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import fuzz
from benchmarks.fuzz_files import KINDS, Seed, drawn_seeds, real_seeds, spoil
from semseg_automl import FailedPrediction, SemanticSegmentor


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SemanticSegmentor:
    """Fit the tiny segmentor once."""
    return fuzz.fit_tiny(tmp_path_factory.mktemp("fit"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep notes on checked files out of the user's cache."""
    monkeypatch.setenv("SEMSEG_AUTOML_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def seeds() -> list[Seed]:
    """Draw the good files once."""
    return drawn_seeds(np.random.default_rng(0))


def run_40(tiny: SemanticSegmentor, folder: Path, **limits: Any) -> fuzz.Outcome:
    return fuzz.run(40, tiny, folder, fuzz.Limits(rows=40, **limits))


def test_run__some_hundred_files__finds_nothing(tiny: SemanticSegmentor, tmp_path: Path) -> None:
    outcome = fuzz.run(200, tiny, tmp_path, fuzz.Limits(rows=100), seed=3)
    assert outcome.violations == []
    assert outcome.files == 200
    assert sum(tally.files > 0 for tally in outcome.tallies.values()) > 20
    readable = sum(tally.readable for tally in outcome.tallies.values())
    assert 30 < readable < 150  # neither refuses everything nor takes everything
    assert not list(tmp_path.glob("batch*"))


def test_run__only_one_batch__repeats_it_and_leaves_its_files(tiny: SemanticSegmentor, tmp_path: Path) -> None:
    whole = fuzz.run(24, tiny, tmp_path / "whole", fuzz.Limits(rows=12))
    last = fuzz.run(24, tiny, tmp_path / "last", fuzz.Limits(rows=12), only=1)
    first = fuzz.run(12, tiny, tmp_path / "first", fuzz.Limits(rows=12))
    for kind in KINDS:
        assert whole.tallies[kind].files == first.tallies[kind].files + last.tallies[kind].files
        assert whole.tallies[kind].readable == first.tallies[kind].readable + last.tallies[kind].readable
    assert (tmp_path / "last" / "batch1" / "good.png").exists()


@pytest.mark.parametrize("kind", list(KINDS))
def test_spoil__every_kind__is_made_and_is_the_same_for_the_same_chance(
    kind: str, seeds: list[Seed], tmp_path: Path
) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rng = np.random.default_rng(1)
        paths += [[spoil(rng, seeds, tmp_path / name, str(i), kind) for i in range(6)]]
    for one, other in zip(*paths, strict=True):
        assert Path(one.path).name == Path(other.path).name
        assert (one.kind, one.verdict, one.seed) == (kind, other.verdict, other.seed)
        if kind != "impossible name" and Path(one.path).is_file() and not Path(one.path).is_symlink():
            assert Path(one.path).read_bytes() == Path(other.path).read_bytes()


def raise_value_error(*_: object, **__: object) -> None:
    raise ValueError("a bug")


def warn_from_elsewhere(read: Callable[..., Any]) -> Callable[..., Any]:
    def warned(*args: Any, **kwargs: Any) -> Any:
        warnings.warn_explicit("not ours", UserWarning, "elsewhere.py", 7)
        return read(*args, **kwargs)

    return warned


@pytest.mark.parametrize(
    ("name", "broken", "told"),
    [
        ("read_image", lambda read: raise_value_error, "ValueError('a bug')"),
        ("read_stored_mask", lambda read: raise_value_error, "ValueError('a bug')"),
        ("read_stored_mask", warn_from_elsewhere, "warning from elsewhere.py:7: not ours"),
        ("read_image", lambda read: lambda path: read(path)[::-1], "but it should be same"),
        ("read_image", lambda read: lambda path: np.zeros((2, 2, 3), np.uint8), "but it should be refused"),
        ("image_size", lambda size: lambda path: (1, 1), "image_size says (1, 1)"),
        ("check_data", lambda check: raise_value_error, "check_data: ValueError"),
        ("check_data", lambda check: lambda frame, path: check(frame.sort_index().head(1)), "check_data tells set()"),
    ],
)
def test_run__fault_in_the_package__is_found(
    tiny: SemanticSegmentor,
    seeds: list[Seed],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    broken: Callable[[Callable[..., Any]], Callable[..., Any]],
    told: str,
) -> None:
    original, calls = getattr(fuzz, name), len(seeds)
    wrong = broken(original)
    count = iter(range(10**6))

    def later(*args: Any, **kwargs: Any) -> Any:
        """Break after the unspoiled files were read."""
        return (wrong if name == "check_data" or next(count) >= calls else original)(*args, **kwargs)

    monkeypatch.setattr(fuzz, name, later)
    assert any(told in violation for violation in run_40(tiny, tmp_path).violations)


@pytest.mark.parametrize("wrong", ["all failed", "none", "raises", "turned"])
def test_run__fault_in_predict__is_found(
    tiny: SemanticSegmentor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def predict(frame: Any, on_error: str) -> list[Any]:
        assert on_error == "report"
        if wrong == "raises":
            raise RuntimeError("a bug")
        failed = FailedPrediction("row", "reason")
        shape = (32, 24) if wrong == "turned" else (24, 32)
        return [failed if wrong == "all failed" else np.zeros(shape, np.uint8) for _ in range(len(frame))]

    monkeypatch.setattr(tiny, "predict", predict)
    violations = run_40(tiny, tmp_path).violations
    assert any("predict: RuntimeError" in each if wrong == "raises" else "predict gives" in each for each in violations)


def test_run__memory_or_time_beyond_the_limit__is_found(
    tiny: SemanticSegmentor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "peak memory grew" in run_40(tiny, tmp_path / "a", memory=-1.0).violations[-1]
    over = threading.Event()

    def hang(*_: object, **__: object) -> None:
        over.wait(60)
        raise ValueError("ended by the test")

    monkeypatch.setattr(fuzz, "check_data", hang)
    try:
        outcome = run_40(tiny, tmp_path / "b", seconds=1.0)
    finally:
        over.set()
    assert outcome.violations[-1] == "batch 0 is not through after 1 s"


def test_within__work_that_raises__raises() -> None:
    with pytest.raises(ValueError, match="a bug"):
        fuzz.within(10, raise_value_error)


def test_run__original_that_is_refused_without_being_listed__is_found(
    tiny: SemanticSegmentor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "REFUSED", set())
    assert any("the unspoiled F.tiff, mask False" in each for each in run_40(tiny, tmp_path).violations)


def test_real_seeds__folder_of_files__takes_images_by_their_content(seeds: list[Seed], tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.png").write_bytes(seeds[0].data)
    (tmp_path / "b.jpg").write_bytes(b"no image")
    (tmp_path / "c.txt").write_bytes(seeds[0].data)
    found = real_seeds(tmp_path, np.random.default_rng(0))
    assert found == [replace(seeds[0], name="a.png", drawn=False)]


def test_main__few_files__prints_the_table_and_gives_the_exit_code(
    tiny: SemanticSegmentor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "fit_tiny", lambda folder: tiny)
    assert fuzz.main(["--files", "30", "--rows", "30"]) == 0
    assert "30 files, " in capsys.readouterr().out
    assert fuzz.main(["--files", "30", "--rows", "30", "--memory", "-1"]) == 1
    assert "VIOLATION" in capsys.readouterr().out
