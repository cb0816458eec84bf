"""What mask values mean: inference from the values found, and the way to class indices and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from semseg_automl.errors import DataError
from semseg_automl.task import IGNORE_INDEX, SegmentationTask, infer_task


def counts(*values: int) -> list[dict[int, int]]:
    """One mask holding each value on ten pixels."""
    return [dict.fromkeys(values, 10)]


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (1, 2), (3, 200), (0, 1000), (1, 255)])
def test_infer_task__two_values__is_binary_with_the_lower_as_background(values: tuple[int, int]) -> None:
    task = infer_task(counts(*values))
    assert (task.kind, task.values, task.ignore_values) == ("binary", values, ())
    assert task.class_names == ("background", "foreground")
    assert (task.num_classes, task.num_scores) == (2, 1)


def test_infer_task__one_mask_all_foreground__changes_nothing() -> None:
    usual = [{0: 90, 255: 10}, {0: 100}]
    for extra in ({255: 100}, {0: 100}):
        assert infer_task([*usual, extra]) == infer_task(usual)
        assert infer_task([extra, *usual]) == infer_task(usual)
    assert infer_task([{0: 100}, {255: 100}]) == infer_task(usual)


def test_infer_task__ids_with_gaps__are_kept() -> None:
    task = infer_task([{7: 5, 0: 5}, {26: 1, 0: 3}])
    assert (task.kind, task.values) == ("multiclass", (0, 7, 26))
    assert task.class_names == ("class_0", "class_7", "class_26")
    assert (task.num_classes, task.num_scores) == (3, 3)


@pytest.mark.parametrize(
    ("found", "classes", "ignored"),
    [
        ((0, 1, 255), (0, 1), (255,)),
        ((0, 1, 2, 255), (0, 1, 2), (255,)),
        ((0, 7, 33, 255), (0, 7, 33), (255,)),
        ((0, 127, 255), (0, 127, 255), ()),  # evenly spaced greys
        ((0, 128, 255), (0, 128, 255), ()),
        ((0, 85, 170, 255), (0, 85, 170, 255), ()),
        ((0, 1, 200, 255), (0, 1, 200, 255), ()),  # 200 is no small id, so these are greys or large ids
        ((-1, 0, 1), (0, 1), (-1,)),
        ((-1, 0, 1, 2, 255), (0, 1, 2), (-1, 255)),
        ((-1, 0, 255), (0, 255), (-1,)),
    ],
)
def test_infer_task__void_values__are_proposed_from_evidence_and_explained(
    found: tuple[int, ...], classes: tuple[int, ...], ignored: tuple[int, ...]
) -> None:
    task = infer_task(counts(*found))
    assert (task.values, task.ignore_values) == (classes, ignored)
    for value in ignored:
        assert any(reason.startswith(f"{value} is ignored because") for reason in task.reasons)


def test_infer_task__ignore_label__is_taken_and_stops_proposals() -> None:
    task = infer_task(counts(0, 1, 2, 255), ignore_label=2)
    assert (task.values, task.ignore_values) == ((0, 1, 255), (2,))
    absent = infer_task(counts(0, 1), ignore_label=255)
    assert (absent.values, absent.ignore_values) == ((0, 1), (255,))
    assert "though no mask holds it" in absent.reasons[0]


@pytest.mark.parametrize(
    ("found", "num_classes", "classes", "ignored"),
    [
        ((0, 1), 2, (0, 1), ()),
        ((0, 255), 2, (0, 255), ()),
        ((0, 1, 255), 2, (0, 1), (255,)),
        ((0, 1), 4, (0, 1, 2, 3), ()),
        ((0, 2, 255), 3, (0, 1, 2), (255,)),  # one class absent: 255 does not take its place
        ((0, 50, 255), 3, (0, 50, 255), ()),
        (tuple(range(150)), 150, tuple(range(150)), ()),
    ],
)
def test_infer_task__num_classes__fixes_the_classes(
    found: tuple[int, ...], num_classes: int, classes: tuple[int, ...], ignored: tuple[int, ...]
) -> None:
    task = infer_task(counts(*found), num_classes=num_classes)
    assert (task.values, task.ignore_values) == (classes, ignored)


def test_infer_task__class_names_in_a_list__are_given_in_the_order_of_the_values() -> None:
    task = infer_task(counts(0, 7, 9), class_names=["ground", "car", "tree"])
    assert dict(zip(task.values, task.class_names, strict=True)) == {0: "ground", 7: "car", 9: "tree"}
    longer = infer_task(counts(0, 2), class_names=["ground", "car", "tree"])
    assert (longer.kind, longer.values) == ("multiclass", (0, 1, 2))
    assert infer_task(counts(0, 255), class_names=("no", "yes")).class_names == ("no", "yes")


def test_infer_task__class_names_by_value__name_absent_classes_too() -> None:
    task = infer_task(counts(0, 7, 255), class_names={9: "tree", 0: "ground", 7: "car"})
    assert task.values == (0, 7, 9)
    assert task.class_names == ("ground", "car", "tree")
    assert task.ignore_values == (255,)
    void = infer_task(counts(0, 1, 255), class_names={0: "a", 1: "b", 255: "c"})
    assert (void.values, void.ignore_values) == ((0, 1, 255), ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value_counts": []}, "0 masks without a pixel"),
        ({"value_counts": [{}, {}]}, "2 masks without a pixel"),
        ({"value_counts": [{0: 5}, {0: 9}]}, "one class only: all masks together hold nothing but the value 0"),
        ({"value_counts": [{0: 5}], "num_classes": 2}, "one class only"),
        ({"value_counts": counts(0, 255), "ignore_label": 255}, "one class only.*beside the ignored 255"),
        ({"value_counts": counts(-1)}, "one class only: .* nothing but ignored values"),
        ({"value_counts": counts(*range(65))}, "65 different values, from 0 to 64; .*anti-aliased or JPEG"),
        ({"value_counts": [{0: 9, 1: 9, 2: 3}], "num_classes": 2}, r"3 values, 0, 1, 2, but 2 .*2 \(3 pixels\)"),
        ({"value_counts": counts(0, 7, 9), "num_classes": 4}, "gaps; name the others with class_names="),
        ({"value_counts": counts(-3, 0, 1)}, "-3 are negative"),
        ({"value_counts": counts(0, 1), "num_classes": 3, "class_names": ["a", "b"]}, "num_classes=3 but 2"),
        ({"value_counts": counts(0, 1, 2), "class_names": ["a", "b"]}, "3 values, 0, 1, 2, but 2 classes"),
        ({"value_counts": counts(0, 5), "class_names": {0: "a", 1: "b"}}, "5, which class_names does not name"),
        ({"value_counts": counts(0, 1), "class_names": {"0": "a", "1": "b"}}, r"class_names has the keys \['0', '1'\]"),
        ({"value_counts": counts(0, 1), "class_names": "ab"}, "class_names is the text 'ab'"),
        ({"value_counts": counts(0, 1), "class_names": ["a", "a"]}, "one name, all different"),
        (
            {"value_counts": counts(0, 1, 2), "class_names": {0: "a", 1: "b", 2: "c"}, "ignore_label": 2},
            "ignore_label=2 is also named",
        ),
        ({"value_counts": counts(*range(255)), "num_classes": 255}, "255 classes; at most 254"),
    ],
)
def test_infer_task__what_cannot_be_a_task__says_what_to_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        infer_task(**arguments)


def test_infer_task__values_with_no_pixels__do_not_count() -> None:
    assert infer_task([{0: 5, 1: 5, 2: 0}]).values == (0, 1)


def test_task__printed__is_five_lines_with_every_class() -> None:
    lines = str(infer_task(counts(0, 3, 255, 4), class_names={0: "sky", 3: "tree", 4: "car"})).splitlines()
    assert len(lines) == 5
    assert "multiclass segmentation, 3 classes" in lines[0]
    assert "0 = sky, 3 = tree, 4 = car" in lines[1]
    assert "255" in lines[2]
    assert "255 is ignored because" in lines[4]
    many = str(infer_task(counts(*range(30)))).splitlines()
    assert len(many) == 5
    assert "and 18 more" in many[1]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_encode__known_values__become_indices(dtype: Any) -> None:
    task = infer_task(counts(0, 7, 26, 255))
    mask = np.array([[0, 7], [26, 255]]).astype(dtype)
    encoded = task.encode(mask)
    assert encoded.dtype == np.uint8
    assert encoded.tolist() == [[0, 1], [2, IGNORE_INDEX]]


def test_encode__negative_and_large_values__become_indices() -> None:
    task = infer_task(counts(-1, 0, 70_000, 1_000))
    assert task.encode(np.array([[-1, 0, 1_000, 70_000]])).tolist() == [[IGNORE_INDEX, 0, 1, 2]]
    assert infer_task(counts(0, 1)).encode(np.array([[False, True]])).tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_encode__value_of_no_class__names_it_and_its_pixels(dtype: Any) -> None:
    task = infer_task(counts(0, 7, 26, 255))
    mask = np.array([[0, 9, 9], [254, 255, 7]]).astype(dtype)
    with pytest.raises(DataError, match=r"^row 3: the mask holds 9 \(2 pixels\), 254 \(1 pixels\), which no class has"):
        task.encode(mask, name="row 3")


def test_decode__class_indices__become_the_users_values_in_the_smallest_type() -> None:
    for values, dtype in {(0, 255): np.uint8, (0, 256): np.uint16, (0, 70_000): np.uint32}.items():
        decoded = infer_task(counts(*values)).decode(np.array([[0, 1]]))
        assert decoded.dtype == dtype
        assert decoded.tolist() == [list(values)]


@pytest.mark.parametrize("index", [-1, 2, 254, 255, 256, 10_000])
def test_decode__index_of_no_class__raises(index: int) -> None:
    with pytest.raises(DataError, match=rf"class indices {index} cannot be written; there are 2 classes, 0 to 1"):
        infer_task(counts(0, 255)).decode(np.array([[0, index]]))


@settings(max_examples=60, deadline=None)
@given(
    values=st.sets(st.integers(0, 70_000), min_size=2, max_size=40),
    ignored=st.sets(st.integers(-1, 70_000), max_size=1),
    seed=st.integers(0, 99),
)
def test_decode__of_encode__is_the_identity(values: set[int], ignored: set[int], seed: int) -> None:
    classes = tuple(sorted(values - ignored))
    if len(classes) < 2:
        return
    names = tuple(f"n{v}" for v in classes)
    task = SegmentationTask("multiclass", classes, names, ignore_values=tuple(ignored))
    usable = [*classes, *(v for v in ignored if v >= 0)]
    mask = np.random.default_rng(seed).choice(usable, (7, 9))
    assert np.array_equal(task.decode(task.encode(mask)), mask)


def test_task__through_yaml__is_equal() -> None:
    task = infer_task(counts(0, 7, 26, 255), class_names={0: "a", 7: "b", 26: "c"})
    assert SegmentationTask.from_dict(yaml.safe_load(yaml.safe_dump(task.to_dict()))) == task


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valuess": [0]}, "unknown key 'valuess'.*did you mean 'values'"),
        ({"values": None}, "values of a task is None; give a list of int"),
        ({"values": [0, True]}, "give a list of int"),
        ({"values": [0, "1"]}, "give a list of int"),
        ({"values": [1, 0]}, "increasing order"),
        ({"values": [0, 1, 2]}, "a binary task with values"),
        ({"values": [0]}, "a binary task with values"),
        ({"class_names": ["a"]}, "1 class names"),
        ({"kind": "ternary"}, "use 'binary' or 'multiclass'"),
        ({"ignore_values": [1]}, "classes and ignored at the same time"),
    ],
)
def test_from_dict__contradiction__raises(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SegmentationTask.from_dict({**infer_task(counts(0, 1)).to_dict(), **change})


def test_from_dict__key_missing__raises() -> None:
    with pytest.raises(DataError, match=r"a task without \['values', 'class_names'\]"):
        SegmentationTask.from_dict({"kind": "binary"})
