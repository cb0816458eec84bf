"""The hold-out split and the folds: nothing lost, groups whole, classes and foreground alike on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semseg_automl import SemanticSegmentor, kfold
from semseg_automl.data.checks import RowCheck, check_rows
from semseg_automl.data.images import write_png
from semseg_automl.data.splits import check_groups_apart, split_holdout
from semseg_automl.data.table import MaskTable, read_frame, read_table
from semseg_automl.errors import ConfigError, DataError
from semseg_automl.task import SegmentationTask, infer_task

PIXELS = 1000
BINARY = SegmentationTask("binary", (0, 255), ("background", "leaf"))
COUNT = 5
MANY = SegmentationTask("multiclass", tuple(range(COUNT)), tuple("abcde"), ignore_values=(255,))
CLASSES = st.lists(st.sets(st.integers(0, COUNT - 1), min_size=1), min_size=2, max_size=30)
EXAMPLES = settings(max_examples=60, deadline=None)


def binary(shares: Sequence[float]) -> tuple[MaskTable, list[RowCheck]]:
    """A table of rows with these shares of foreground."""
    table = MaskTable(tuple(f"{i}.png" for i in range(len(shares))), None, pd.RangeIndex(len(shares)))
    counts = [{value: round(PIXELS * share) for value, share in ((0, 1 - s), (255, s)) if share} for s in shares]
    return table, [RowCheck(size=(10, 100), value_counts=c) for c in counts]


def holding(
    classes: Sequence[set[int]], groups: Sequence[int] | None = None, void: int = 0
) -> tuple[MaskTable, list[RowCheck]]:
    """A table whose rows hold these classes, each as many pixels, and pixels without a label."""
    table = MaskTable(
        tuple(f"{i}.png" for i in range(len(classes))),
        None,
        pd.Index([f"row{i}" for i in range(len(classes))]),
        None if groups is None else tuple(groups),
    )
    counts = [dict.fromkeys(row, PIXELS // len(row)) | ({255: void} if void else {}) for row in classes]
    return table, [RowCheck(size=(10, 100), value_counts=c) for c in counts]


def presence(classes: Sequence[set[int]], groups: Sequence[int]) -> np.ndarray[Any, Any]:
    """Whether each group ``(G, C)`` holds each class."""
    return np.array([
        [any(c in row for row, g in zip(classes, groups, strict=True) if g == group) for c in range(COUNT)]
        for group in sorted(set(groups))
    ])  # fmt: skip


def both_sides(present: np.ndarray[Any, Any], held: np.ndarray[Any, Any]) -> int:
    """Count the classes of two groups or more that are on both sides."""
    return int((present[held].any(axis=0) & present[~held].any(axis=0)).sum())


@EXAMPLES
@given(CLASSES, st.floats(0.01, 0.99), st.integers(0, 9))
def test_split_holdout__any_rows__are_parted_in_order_and_alike_for_a_seed(
    classes: list[set[int]], frac: float, seed: int
) -> None:
    table, checks = holding(classes, void=7)
    train, validation = split_holdout(table, checks, frac=frac, seed=seed, task=MANY)
    order = {name: position for position, name in enumerate(table.index)}
    parts = [[order[name] for name in part.index] for part in (train, validation)]
    assert sorted(parts[0] + parts[1]) == list(range(len(classes)))
    assert all(part and part == sorted(part) for part in parts)
    assert [part.images for part in (train, validation)] == [tuple(f"{i}.png" for i in part) for part in parts]
    again = split_holdout(table, checks, frac=frac, seed=seed, task=MANY)
    assert [list(part.index) for part in again] == [list(train.index), list(validation.index)]


@EXAMPLES
@given(CLASSES, st.floats(0.05, 0.5), st.data())
def test_split_holdout__groups__stay_whole_and_no_single_move_would_spread_the_classes_better(
    classes: list[set[int]], frac: float, data: st.DataObject
) -> None:
    groups = data.draw(st.lists(st.integers(0, 8), min_size=len(classes), max_size=len(classes)))
    if len(set(groups)) < 2:
        groups[0] = 9
    table, checks = holding(classes, groups)
    train, validation = split_holdout(table, checks, frac=frac, seed=0, task=MANY)
    assert set(train.groups or ()).isdisjoint(validation.groups or ())
    assert validation.groups
    assert train.groups
    present = presence(classes, groups)
    held = np.array([group in validation.groups for group in sorted(set(groups))])
    reached = both_sides(present, held)
    for group in range(len(held)):
        moved = held.copy()
        moved[group] = not moved[group]
        if moved.any() and not moved.all():
            assert both_sides(present, moved) <= reached


@EXAMPLES
@given(st.lists(st.integers(1, 6), min_size=COUNT, max_size=COUNT), st.floats(0.02, 0.5), st.integers(0, 9))
def test_split_holdout__each_row_of_one_class__every_class_of_two_rows_is_on_both_sides(
    numbers: list[int], frac: float, seed: int
) -> None:
    classes = [{c} for c, number in enumerate(numbers) for _ in range(number)]
    table, checks = holding(classes)
    _, validation = split_holdout(table, checks, frac=frac, seed=seed, task=MANY)
    held = [classes[table.index.get_loc(name)] for name in validation.index]
    for c, number in enumerate(numbers):
        if number > 1:
            assert 1 <= held.count({c}) < number
    needed = sum(number > 1 for number in numbers)
    assert len(held) == max(needed, 1, min(round(frac * len(classes)), len(classes) - 1)) or needed == 0


def test_split_holdout__classes_of_all_frequencies__are_held_out_in_proportion() -> None:
    rng = np.random.default_rng(0)
    chances = np.array([1.0, 0.5, 0.25, 0.1, 0.05])
    classes = [set(np.flatnonzero(rng.random(COUNT) < chances).tolist()) for _ in range(400)]
    table, checks = holding(classes)
    total = presence(classes, range(400)).sum(axis=0)
    for seed in range(3):
        _, validation = split_holdout(table, checks, frac=0.2, seed=seed, task=MANY)
        rows = [int(name[3:]) for name in validation.index]
        assert len(rows) == 80
        assert np.abs(presence([classes[r] for r in rows], range(80)).sum(axis=0) - 0.2 * total).max() <= 2


@pytest.mark.parametrize("seed", range(5))
def test_split_holdout__empty_and_full_masks__are_held_out_in_proportion(seed: int) -> None:
    shares = [0.0] * 40 + [0.1] * 20 + [0.4] * 20
    table, checks = binary(list(np.random.default_rng(seed).permutation(shares)))
    _, validation = split_holdout(table, checks, frac=0.2, seed=seed, task=BINARY)
    held = [round(checks[i].value_counts.get(255, 0) / PIXELS, 1) for i in validation.index]
    assert sorted(held) == [0.0] * 8 + [0.1] * 4 + [0.4] * 4


@pytest.mark.parametrize("seed", range(5))
def test_split_holdout__shares_of_foreground__are_drawn_from_all_along_their_range(seed: int) -> None:
    table, checks = binary([i / 100 for i in range(1, 51)])
    train, validation = split_holdout(table, checks, frac=0.2, seed=seed, task=BINARY)
    assert (len(train), len(validation)) == (40, 10)
    assert [position // 5 for position in validation.index] == list(range(10))
    other = split_holdout(table, checks, frac=0.2, seed=seed + 100, task=BINARY)[1]
    assert other.images != validation.images


def test_split_holdout__pixels_without_a_label__are_no_class() -> None:
    table, checks = holding([{0}] * 18 + [{0, 1}] * 2)
    checks = [RowCheck(c.size, c.value_counts | ({255: 5} if i < 2 else {})) for i, c in enumerate(checks)]
    sides = {tuple(sorted(split_holdout(table, checks, frac=0.1, seed=s, task=MANY)[1].index)) for s in range(30)}
    assert all(len({"row18", "row19"} & set(side)) == 1 for side in sides)
    assert any({"row0", "row1"}.isdisjoint(side) for side in sides)


@pytest.mark.parametrize(
    ("rows", "frac", "held"), [(2, 0.5, 1), (2, 0.99, 1), (3, 0.01, 1), (10, 0.25, 2), (7, 0.9, 6)]
)
def test_split_holdout__small_tables__keep_a_row_on_either_side(rows: int, frac: float, held: int) -> None:
    table, checks = binary([0.1] * rows)
    train, validation = split_holdout(table, checks, frac=frac, seed=0, task=BINARY)
    assert (len(train), len(validation)) == (rows - held, held)


@pytest.mark.parametrize("sizes", [[50, 50], [97, 1, 1, 1], [10] * 10, [30, 25, 20, 10, 5, 5, 5]])
def test_split_holdout__groups_of_many_sizes__hold_out_as_near_to_the_share_as_one_move_gets(sizes: list[int]) -> None:
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    table, checks = holding([{0, 1}] * 100, groups)
    for seed in range(4):
        _, validation = split_holdout(table, checks, frac=0.2, seed=seed, task=MANY)
        held = set(validation.groups or ())
        off = abs(len(validation) - 20)
        for group, size in enumerate(sizes):
            moved = len(validation) + (-size if group in held else size)
            assert abs(moved - 20) >= off or moved in (0, 100)


def test_split_holdout__what_cannot_be_split__raises() -> None:
    table, checks = binary([0.1])
    with pytest.raises(DataError, match=r"a table of 1 row cannot be split .*tuning_data="):
        split_holdout(table, checks, frac=0.5, seed=0, task=BINARY)
    table, checks = binary([0.1] * 4)
    for frac in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="use a fraction above 0 and below 1"):
            split_holdout(table, checks, frac=frac, seed=0, task=BINARY)
    with pytest.raises(DataError, match="3 checks for 4 rows"):
        split_holdout(table, checks[:3], frac=0.5, seed=0, task=BINARY)
    table, checks = holding([{0, 1}] * 4, groups=[3] * 4)
    with pytest.raises(DataError, match=r"a table of 1 group cannot .* leave out groups="):
        split_holdout(table, checks, frac=0.5, seed=0, task=MANY)


def test_check_groups_apart__shared_groups__are_named() -> None:
    left, right = (holding([{0}] * 8, groups)[0] for groups in (range(8), range(2, 10)))
    with pytest.raises(DataError, match=r"6 groups .*: 2, 3, 4, 5, 6 and 1 more"):
        check_groups_apart(left, right)
    check_groups_apart(left, holding([{0}] * 2, [8, 9])[0])
    check_groups_apart(left, holding([{0}] * 2)[0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of four patients with masks, and a table of them; the last column is not ours."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        mask = np.zeros((8, 10), np.uint8)
        mask[: i % 4] = 1
        if i in (2, 7):
            mask[7] = 2
        write_png(tmp_path / f"images/{i}.png", rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
        write_png(tmp_path / f"masks/{i}.png", mask)
        rows.append({"image": f"images/{i}.png", "label": f"masks/{i}.png", "patient": f"p{i // 3}", "age": 40 + i})
    pd.DataFrame(rows).to_csv(tmp_path / "train.csv", index=False)
    return tmp_path


@pytest.mark.parametrize("groups", [None, "patient"])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_kfold__of_a_frame__validates_every_row_once_and_keeps_index_columns_and_order(
    folder: Path, k: int, groups: str | None
) -> None:
    frame = pd.read_csv(folder / "train.csv").set_index(pd.Index(list("lkjihgfedcba")))
    folds = kfold(frame, k, groups=groups, base_dir=folder, seed=1)
    assert len(folds) == k
    assert sorted(name for _, validation in folds for name in validation.index) == sorted(frame.index)
    for train, validation in folds:
        pd.testing.assert_frame_equal(pd.concat([train, validation]).reindex(frame.index), frame)
        assert all(list(part.index) == [n for n in frame.index if n in set(part.index)] for part in (train, validation))
        if groups:
            assert set(train["patient"]).isdisjoint(validation["patient"])
    again = kfold(frame, k, groups=groups, base_dir=folder, seed=1)
    assert [list(v.index) for _, v in again] == [list(v.index) for _, v in folds]
    others = [kfold(frame, k, groups=groups, base_dir=folder, seed=seed) for seed in range(2, 7)]
    assert any([list(v.index) for _, v in other] != [list(v.index) for _, v in folds] for other in others)


def test_kfold__of_a_csv_file__gives_frames_that_can_be_read_from_anywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folds = kfold(str(folder / "train.csv"), 3)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert [len(validation) for _, validation in folds] == [4, 4, 4]
    for train, validation in folds:
        assert len(check_rows(read_table(train))) == len(train)
        assert len(check_rows(read_table(validation))) == len(validation)
    kept = kfold(folder / "train.csv", 3, base_dir=folder)
    assert kept[0][0]["image"].iloc[0].startswith("images")


def test_kfold__rare_class__is_in_every_training_part(folder: Path) -> None:
    for seed in range(6):
        for train, _ in kfold(folder / "train.csv", 4, seed=seed):
            assert train["image"].str.contains(r"[/\\](?:2|7)\.png").any()


@EXAMPLES
@given(st.lists(st.integers(1, 9), min_size=COUNT, max_size=COUNT), st.integers(2, 5), st.integers(0, 9))
def test_kfold__classes_of_k_rows__are_in_both_parts_of_every_fold(numbers: list[int], k: int, seed: int) -> None:
    classes = [c for c, number in enumerate(numbers) for _ in range(number)]
    if len(classes) < k:
        classes += [0] * k
    masks = [np.full((2, 2), c, np.uint8) for c in classes]
    frame = pd.DataFrame({"image": [np.zeros((2, 2, 3), np.uint8)] * len(classes), "label": masks})
    folds = kfold(frame, k, seed=seed, task=MANY)
    assert sorted(row for _, validation in folds for row in validation.index) == list(range(len(classes)))
    for train, validation in folds:
        trained, validated = ([classes[row] for row in part.index] for part in (train, validation))
        for c in set(classes):
            assert c in trained or classes.count(c) < 2
            assert c in validated or classes.count(c) < k


def test_kfold__real_classes__are_as_frequent_in_every_fold(shared: Callable[[str], Path]) -> None:
    path = shared("data/camvid/train.csv")
    table = read_table(path)
    checks = check_rows(table)
    task = infer_task([check.value_counts for check in checks])
    present = np.array([[value in check.value_counts for value in task.values] for check in checks])
    number = {image: position for position, image in enumerate(table.images)}
    off = []
    for seed in range(3):
        for _, validation in kfold(path, 5, task=task, seed=seed):
            share = present[[number[image] for image in validation["image"]]].mean(axis=0)
            assert len(validation) == 20
            off.append(np.abs(share - present.mean(axis=0)))
    assert np.mean(off) < 0.0215, "0.018 over many seeds, at random 0.040"


@pytest.mark.parametrize("k", [1, 0, -3, 2.5, "5", True])
def test_kfold__no_number_of_folds__is_refused(k: Any, folder: Path) -> None:
    with pytest.raises(ConfigError, match="whole number of folds, 2 or more"):
        kfold(folder / "train.csv", k)


def test_kfold__too_few_rows_or_groups__is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"12 rows cannot be split into 13 folds.*fewer folds"):
        kfold(folder / "train.csv", 13)
    with pytest.raises(DataError, match="4 groups cannot be split into 5 folds"):
        kfold(folder / "train.csv", 5, groups="patient")


@pytest.mark.parametrize("use", ["kfold", "fit"])
def test_groups__column_that_cannot_be_used__is_explained(use: str, folder: Path) -> None:
    frame = pd.read_csv(folder / "train.csv")

    def split(table: pd.DataFrame, column: str) -> None:
        if use == "kfold":
            kfold(table, 2, groups=column, base_dir=folder)
        else:
            SemanticSegmentor(base_dir=folder, verbosity=0).fit(table, groups=column, dry_run=True)

    with pytest.raises(DataError, match=r"no column 'pateint'; did you mean 'patient'\?"):
        split(frame, "pateint")
    with pytest.raises(DataError, match=r"column 'patient' .* no group in rows 3, 5; give each row one"):
        split(frame.assign(patient=frame["patient"].mask(frame.index.isin([3, 5]))), "patient")
    with pytest.raises(DataError, match="1 group cannot be split"):
        split(frame.assign(patient="same"), "patient")
    with pytest.raises(DataError, match=r"no group in row 0; use texts or numbers"):
        split(frame.assign(patient=pd.Series([[1], *range(11)])), "patient")


def test_fit__groups__holds_whole_groups_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[MaskTable] = []
    monkeypatch.setattr(SemanticSegmentor, "_train", lambda self, *tables_and_more: parts.extend(tables_and_more[:2]))
    for seed in range(3):
        SemanticSegmentor(verbosity=0).fit(folder / "train.csv", groups="patient", seed=seed)
        train, validation = parts[-2:]
        assert set(train.groups or ()) | set(validation.groups or ()) == {"p0", "p1", "p2", "p3"}
        assert set(train.groups or ()).isdisjoint(validation.groups or ())


def test_fit__groups_in_both_tables_given__are_refused(folder: Path) -> None:
    frame = pd.read_csv(folder / "train.csv")
    segmentor = SemanticSegmentor(base_dir=folder, verbosity=0)
    with pytest.raises(DataError, match=r"1 groups? .*'p1'"):
        segmentor.fit(frame.iloc[:5], frame.iloc[5:], groups="patient", dry_run=True)
    segmentor.fit(frame.iloc[:6], frame.iloc[6:], groups="patient", dry_run=True)


def test_read_frame__of_a_frame__is_the_frame_itself(folder: Path) -> None:
    frame = pd.read_csv(folder / "train.csv")
    assert read_frame(frame) is frame
