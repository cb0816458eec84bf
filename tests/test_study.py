"""The study of fine-tuning methods: order, choice of rates, resuming and table on made-up rows, and a tiny real run."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import study as study_module
from benchmarks.study import METHODS, Study, cells_left, main, progress_line, settings_of
from benchmarks.study_table import (
    Cell,
    ImageRow,
    Row,
    append_rows,
    chosen_rate,
    compare,
    holm,
    images_file,
    mean_and_error,
    rate_at_edge,
    read_rows,
    study_table,
)
from semseg_automl.data.synthetic import draw_dataset
from semseg_automl.errors import ConfigError, DataError

BUDGET = (150, 4, 256)
PLAN = Study(
    data=Path("data"),
    checkpoint=Path("vit.safetensors"),
    out=Path("study.csv"),
    sets=("polyp", "nuclei"),
    methods=("lora", "full"),
    seeds=(0, 1),
    rates=(1e-3, 3e-3),
    extra_rates=(("full", 1e-4),),
)


def done(
    method: str, lr: float, validation: float, *, seed: int = 0, phase: str = "search", name: str = "polyp", **rest: Any
) -> Row:
    return Row(name, method, lr, seed, phase, *BUDGET, validation=validation, seconds=60.0, **rest)


def as_row(cell: Cell, validation: float) -> Row:
    return done(cell.method, cell.lr, validation, seed=cell.seed, phase=cell.phase, name=cell.set)


def run_all(study: Study, scores: dict[float, float], fails: frozenset[Cell] = frozenset()) -> list[Cell]:
    """The order in which a whole study runs, its validation scores given by rate."""
    rows: list[Row] = []
    order: list[Cell] = []
    given_up: set[Cell] = set()
    while left := cells_left(study, rows, given_up):
        order.append(left[0])
        if left[0] in fails:
            given_up.add(left[0])
        else:
            rows.append(as_row(left[0], scores[left[0].lr]))
    return order


def test_cells_left__whole_study__runs_breadth_first_at_the_best_rates() -> None:
    order = run_all(PLAN, {1e-4: 0.9, 1e-3: 0.7, 3e-3: 0.8})
    first = [
        Cell("polyp", "lora", 1e-3, 0, "search"),
        Cell("polyp", "full", 1e-3, 0, "search"),
        Cell("polyp", "lora", 3e-3, 0, "search"),
        Cell("polyp", "full", 3e-3, 0, "search"),
        Cell("polyp", "full", 1e-4, 0, "search"),
        Cell("polyp", "lora", 3e-3, 0, "final"),
        Cell("polyp", "full", 1e-4, 0, "final"),
        Cell("polyp", "lora", 3e-3, 1, "final"),
        Cell("polyp", "full", 1e-4, 1, "final"),
    ]
    assert order == [*first, *(replace(cell, set="nuclei") for cell in first)]


def test_cells_left__nothing_done_yet__counts_the_runs_whose_rate_is_unknown() -> None:
    left = cells_left(PLAN, [])
    assert len(left) == len(run_all(PLAN, {1e-4: 0.9, 1e-3: 0.7, 3e-3: 0.8}))
    assert {math.isnan(cell.lr) for cell in left if cell.phase == "final"} == {True}


def test_cells_left__rows_of_another_budget_or_failed__count_as_not_done() -> None:
    search = done("lora", 1e-3, 0.5)
    assert search.cell not in cells_left(PLAN, [search])
    assert cells_left(PLAN, [replace(search, steps=300)]) == cells_left(PLAN, [])
    failed = cells_left(PLAN, [replace(search, phase="failed")])
    assert [str(cell) for cell in failed] == [str(cell) for cell in cells_left(PLAN, [])]


def test_cells_left__one_search_failed__goes_on_with_the_others() -> None:
    best = Cell("polyp", "lora", 3e-3, 0, "search")
    finals = [c for c in run_all(PLAN, {1e-4: 0.9, 1e-3: 0.7, 3e-3: 0.8}, frozenset([best])) if c.phase == "final"]
    assert finals[0] == Cell("polyp", "lora", 1e-3, 0, "final")
    assert len(finals) == 8


def test_cells_left__all_searches_of_a_method_failed__leaves_its_finals_out() -> None:
    fails = frozenset(Cell("polyp", "lora", lr, 0, "search") for lr in PLAN.rates)
    order = run_all(PLAN, {1e-4: 0.9, 1e-3: 0.7, 3e-3: 0.8}, fails)
    assert [cell.set for cell in order if (cell.method, cell.phase) == ("lora", "final")] == ["nuclei", "nuclei"]
    assert sum(cell.method == "full" for cell in order) == 10


def test_cells_left__extended_grid_wins__runs_the_finals_again_at_the_new_rate() -> None:
    small = replace(PLAN, sets=("polyp",), methods=("full",), extra_rates=())
    rows = [as_row(cell, {1e-3: 0.7, 3e-3: 0.6}[cell.lr]) for cell in run_all(small, {1e-3: 0.7, 3e-3: 0.6})]
    assert cells_left(small, rows) == []
    wider = replace(small, extra_rates=(("full", 1e-4),))
    new = Cell("polyp", "full", 1e-4, 0, "search")
    assert cells_left(wider, rows) == [new]
    assert cells_left(wider, [*rows, as_row(new, 0.8)]) == [
        Cell("polyp", "full", 1e-4, seed, "final") for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("scores", "rate", "edge"),
    [
        ({3e-4: 0.5, 1e-3: 0.7, 3e-3: 0.6}, 1e-3, False),
        ({3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.7}, 3e-3, True),
        ({3e-4: 0.7, 1e-3: 0.6}, 3e-4, True),
        ({3e-4: 0.5, 1e-3: 0.5, 3e-3: math.nan}, 3e-4, True),
    ],
)
def test_chosen_rate__searches__is_the_best_on_validation(scores: dict[float, float], rate: float, edge: bool) -> None:
    rows = [done("lora", lr, score, iou=1 - score) for lr, score in scores.items()]
    # What must not be looked at: finals, other methods, sets and budgets.
    rows += [done("lora", 9.0, 0.99, phase="final"), done("full", 9.0, 0.99), done("lora", 9.0, 0.99, name="nuclei")]
    rows.append(replace(done("lora", 9.0, 0.99), batch=8))
    assert chosen_rate(rows, "polyp", "lora", BUDGET) == rate
    assert rate_at_edge(rows, "polyp", "lora", BUDGET) is edge
    assert chosen_rate(rows, "polyp", "vpt", BUDGET) is None


def test_rows__written_and_read__are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "new" / "study.csv"
    row = done("lora", 3e-4, 0.123456, message='a "quoted", text', torch="2.13.0", iou=0.5)
    assert read_rows(path, Row) == []
    append_rows(path, [row])
    append_rows(path, [replace(row, seed=1)])
    assert [str(r) for r in read_rows(path, Row)] == [str(row), str(replace(row, seed=1))]
    assert path.read_text().count("set,method,lr") == 1


def test_read_rows__line_cut_off_or_other_columns__is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.csv"
    append_rows(path, [done("lora", 3e-4, 0.5), done("lora", 1e-3, 0.5)])
    whole = path.read_text()
    path.write_text(whole[:-40])
    with pytest.raises(DataError, match=r"line 3 of .* is damaged"):
        read_rows(path, Row)
    path.write_text(whole.replace("lr,", "learning_rate,", 1))
    with pytest.raises(DataError, match="learning_rate"):
        read_rows(path, Row)


def test_holm__any_p_values__are_no_smaller_and_keep_their_order() -> None:
    raw = [0.2, 0.001, 0.04, 0.03, 0.9]
    corrected = holm(raw)
    assert corrected == pytest.approx([0.4, 0.005, 0.12, 0.12, 0.9])
    assert holm([]) == []


def test_compare__constant_gain_on_common_seeds__is_found_with_its_interval() -> None:
    rng = np.random.default_rng(0)
    base = {seed: {f"{i}.png": float(rng.uniform(0.3, 0.8)) for i in range(40)} for seed in (0, 1)}
    gain = {f"{i}.png": 0.05 + 0.02 * float(rng.standard_normal()) for i in range(40)}
    better = {0: {image: iou + gain[image] for image, iou in base[0].items()}, 2: base[1]}
    found = compare(better, base)
    assert found is not None
    assert found.difference == pytest.approx(np.mean(list(gain.values())))
    assert 0 < found.low < found.difference < found.high < 0.1
    assert found.p < 1e-6
    assert found == compare(better, base), "the bootstrap's seed is fixed"


def test_compare__no_difference_or_nothing_in_common__claims_nothing() -> None:
    scores = {0: {"a": 0.5, "b": 0.7}}
    same = compare(scores, scores)
    assert same is not None
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert compare(scores, {1: scores[0]}) is None
    assert compare(scores, {0: {"c": 0.5}}) is None


def test_mean_and_error__three_seeds__divides_by_the_root_of_three() -> None:
    assert mean_and_error([0.70, 0.72, 0.74]) == f"0.720 ± {0.02 / math.sqrt(3):.3f}"


def made_up_study() -> tuple[list[Row], list[ImageRow]]:
    """Two methods searched at three rates; a final run at a rate that is no longer the best; a failure made up for."""
    rows = [Row("polyp", "lora", 3e-4, 0, "failed", *BUDGET, message="RuntimeError: no memory")]
    rows += [done("lora", lr, v) for lr, v in ((3e-4, 0.5), (1e-3, 0.7), (3e-3, 0.6))]
    rows += [done("full", lr, v, trainable=5_500_000) for lr, v in ((3e-4, 0.7), (1e-3, 0.6))]
    rows.append(Row("polyp", "full", 3e-3, 0, "failed", *BUDGET, message="TrainingError: nan"))
    images: list[ImageRow] = []
    figures = {("full", 1e-3): (0.1, 0.1), ("lora", 1e-3): (0.70, 0.74), ("full", 3e-4): (0.60, 0.62)}
    for (method, lr), ious in figures.items():
        for seed, iou in enumerate(ious):
            rows.append(
                done(
                    method,
                    lr,
                    0.7,
                    seed=seed,
                    phase="final",
                    iou=iou,
                    s_measure=0.8,
                    trainable=1_234_567,
                    torch="2.13.0",
                    commit="abc1234",
                )
            )
            for i in range(12):
                images.append(ImageRow("polyp", method, lr, seed, *BUDGET, f"{i}.png", iou + 0.001 * i))
    return rows, images


def test_study_table__made_up_rows__shows_the_chosen_rates_and_the_paired_difference() -> None:
    rows, images = made_up_study()
    lines = study_table(rows, images).splitlines()
    assert "### polyp: 150 steps, batch 4, 256 px" in lines
    lora, full = (next(line for line in lines if line.startswith(f"| {method} |")) for method in ("lora", "full"))
    assert lora.startswith("| lora | 1.23 | 0.001 | 0 1 | 0.720 ± 0.020 | 0.800 ± 0.000 | 60 |")
    assert full.startswith("| full | 1.23 | 0.0003 † | 0 1 | 0.610 ± 0.010 | 0.800 ± 0.000 | 60 |")
    assert "-0.110 [-0.110, -0.110], p < 0.001" in full
    assert not any("no memory" in line for line in lines), "it was tried again and done"
    assert "Failed: full, lr 0.003, seed 0: TrainingError: nan" in lines
    assert "torch 2.13.0; commit abc1234.  " in lines


def test_study_table__searches_only__says_that_no_final_run_is_there() -> None:
    text = study_table([done("lora", 1e-3, 0.5), done("lora", 1e-3, 0.5, name="nuclei")], [])
    assert text.count("No final run yet.") == 2


@pytest.mark.parametrize("method", METHODS)
def test_settings__any_method__share_everything_but_the_method_and_the_rate(method: str) -> None:
    settings = settings_of(PLAN, method, 1e-3)
    own = set(METHODS[method])
    assert own <= set(settings)
    # Windows are another encoder, no detail branch another decoder: methods that ask for them compare with their like.
    network = ("optim.peft", "model.window_size", "model.detail")
    assert all(key in network or key.startswith("optim.lora.") for key in own)
    assert {key: value for key, value in settings.items() if key not in own} == {
        key: value for key, value in settings_of(PLAN, "decoder_only", 1e-3).items() if key != "optim.peft"
    }


def test_progress_line__runs_left__estimates_the_rest() -> None:
    row = done("lora", 1e-3, 0.5)
    assert progress_line(row.cell, row, 3, 30, [100.0, 140.0]).endswith("about 1 h 00 min left")
    assert progress_line(row.cell, row, 3, 30, [100.0, 140.0]).startswith("[3/33] polyp lora lr 0.001 seed 0 search:")


def plain_vit(path: Path) -> Path:
    """Write a plain ViT of one block, one head and patches of 8 pixels, under timm's names."""
    dim = 64
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 17, dim), "patch_embed.proj.weight": (dim, 3, 8, 8)}
    shapes |= {"patch_embed.proj.bias": (dim,)}
    for name, (out, inside) in {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}.items():
        shapes |= {f"blocks.0.{name}.weight": (out * dim, inside * dim), f"blocks.0.{name}.bias": (out * dim,)}
    for name in ("norm1", "norm2"):
        shapes |= {f"blocks.0.{name}.weight": (dim,), f"blocks.0.{name}.bias": (dim,)}
    save_file({name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}, path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the set "drawn", a checkpoint and the finished study of it."""
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    plain_vit(folder / "vit.safetensors")
    draw_dataset(folder / "data" / "drawn", kind="binary", train=6, val=2, test=6, size=(32, 40))
    run(folder)
    return folder


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    """The finished study in a folder of the test's own."""
    return Path(shutil.copytree(world, tmp_path / "copy"))


def run(folder: Path, *more: str) -> None:
    arguments = ["--data", str(folder / "data"), "--checkpoint", str(folder / "vit.safetensors")]
    arguments += ["--out", str(folder / "study.csv"), "--sets", "drawn", "--methods", "decoder_only", "lora"]
    arguments += ["--steps", "3", "--batch", "2", "--size", "32", "--seeds", "0", "1", "--rates", "1e-3", "1e-2"]
    main(["run", *arguments, *more])


def rows_of(folder: Path) -> list[Row]:
    return read_rows(folder / "study.csv", Row)


def test_run__tiny_study__writes_every_run_and_scores_only_the_finals(world: Path) -> None:
    rows = rows_of(world)
    assert [row.phase for row in rows] == ["search"] * 4 + ["final"] * 4
    assert all(row.trainable > 0 and row.seconds > 0 and math.isfinite(row.validation) for row in rows)
    for row in rows:
        scores = (row.iou, row.dice, row.s_measure, row.e_measure, row.ber, row.mae)
        assert all(math.isnan(score) for score in scores) == (row.phase == "search")
        assert all(math.isfinite(score) for score in scores) == (row.phase == "final")
    for method in ("decoder_only", "lora"):
        best = max((row for row in rows if (row.method, row.phase) == (method, "search")), key=lambda r: r.validation)
        finals = [row for row in rows if (row.method, row.phase) == (method, "final")]
        assert {row.lr for row in finals} == {best.lr}
        assert (finals[0].validation, finals[0].seconds) == (best.validation, best.seconds), "reused, not repeated"
    assert not list((world / "runs").rglob("*.safetensors")), "scored networks are deleted"


def test_run__image_scores__average_to_the_iou_of_evaluate(world: Path) -> None:
    images = read_rows(images_file(world / "study.csv"), ImageRow)
    for row in rows_of(world):
        scores = [i.iou for i in images if (i.method, i.lr, i.seed) == (row.method, row.lr, row.seed)]
        if row.phase == "final":
            assert len(scores) == 6
            assert np.mean(scores) == pytest.approx(row.iou, abs=2e-6)
    assert {image.image for image in images} == {f"images/test_{i:03d}.png" for i in range(6)}


def test_run__finished_study__does_nothing_more(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (copied / "study.csv").read_bytes()
    monkeypatch.setattr(study_module, "fit", None)
    run(copied)
    assert (copied / "study.csv").read_bytes() == before


def test_run__rows_missing__does_those_alone_and_fits_again_what_was_not_kept(copied: Path) -> None:
    whole = rows_of(copied)
    lines = (copied / "study.csv").read_text().splitlines(keepends=True)
    final_of_search_seed, last = lines.pop(5), lines.pop()
    assert ",0,final," in final_of_search_seed
    assert ",1,final," in last
    (copied / "study.csv").write_text("".join(lines))
    run(copied)
    again = rows_of(copied)
    assert (copied / "study.csv").read_text().startswith("".join(lines))
    assert [row.cell for row in again[-2:]] == [whole[4].cell, whole[7].cell]
    assert [row.iou for row in again[-2:]] == pytest.approx([whole[4].iou, whole[7].iou], abs=1e-4)


def test_run__one_method_fails__is_noted_and_tried_again(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "study.csv").unlink()
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "lora", {"optim.peft": "lorra"})
        run(copied, "--seeds", "0")
    assert [(row.method, row.phase) for row in rows_of(copied)] == [
        ("decoder_only", "search"),
        ("lora", "failed"),
        ("decoder_only", "search"),
        ("lora", "failed"),
        ("decoder_only", "final"),
    ]
    assert "lorra" in rows_of(copied)[1].message
    assert "lorra" in capsys.readouterr().out
    run(copied, "--seeds", "0")
    assert [(row.method, row.phase) for row in rows_of(copied)[5:]] == [
        ("lora", "search"),
        ("lora", "search"),
        ("lora", "final"),
    ]


def test_table__finished_study__is_printed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["table", "--out", str(world / "study.csv")])
    printed = capsys.readouterr().out
    assert "### drawn: 3 steps, batch 2, 32 px" in printed
    assert next(line for line in printed.splitlines() if line.startswith("| decoder_only |")).count(", p ") == 1


def test_run__set_missing_or_of_many_classes__stops_before_the_first_fit(copied: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no train\.csv"):
        run(copied, "--sets", "drawn", "elsewhere")
    draw_dataset(copied / "data" / "many", kind="multiclass", train=3, val=3, test=3, size=(32, 40))
    with pytest.raises(ConfigError, match="multiclass"):
        run(copied, "--sets", "many")


def test_main__rate_for_a_method_that_is_not_run__is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(copied, "--extra-rates", "full=1e-4")
    assert "--extra-rates names full" in capsys.readouterr().err
