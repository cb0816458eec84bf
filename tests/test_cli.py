"""The command line: the same functions, answers at once, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from semseg_automl import cli
from semseg_automl.data.images import read_image
from semseg_automl.data.synthetic import draw_dataset
from semseg_automl.estimator import SemanticSegmentor

SMALL = [
    "-s", "model.input_size=64", "-s", "model.decoder_dim=32", "-s", "model.detail=false",
    "-s", "optim.max_epochs=1", "-s", "env.precision=32-true", "-s", "env.batch_size=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a small data set."""
    return draw_dataset(tmp_path_factory.mktemp("data"), kind="binary", train=8, val=3, test=3, size=(64, 80))


def run(*arguments: str) -> str:
    """Run a command that must succeed and return what it printed."""
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_cli__fit_evaluate_predict_info__go_through(folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    printed = run("fit", str(folder / "train.csv"), "--val", str(folder / "val.csv"), "--out", str(bundle), *SMALL)
    assert "binary segmentation" in printed
    assert "saved in" in printed
    figures = json.loads(run("evaluate", str(bundle), str(folder / "test.csv"), "--json"))
    assert 0 <= figures["iou"] <= 1
    assert "s_measure" in run("evaluate", str(bundle), str(folder / "test.csv"))
    assert "3 masks" in run("predict", str(bundle), str(folder / "test.csv"), "--out", str(tmp_path / "masks"))
    table = pd.read_csv(tmp_path / "masks" / "predictions.csv")
    assert table["mask"].map(lambda path: Path(path).is_file()).all()
    out = tmp_path / "overlays"
    arguments = ("predict", str(bundle), str(folder / "test.csv"), "--out", str(out), "--format", "overlay", "--resume")
    assert "3 masks" in run(*arguments)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert {read_image(path).shape for path in before} == {(64, 80, 3)}
    run(*arguments)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.png")}, "kept, not written again"
    described = run("info", str(bundle))
    assert "tiny_vit" in described
    assert "because" in described


def test_cli__report_review_calibrate__do_what_the_methods_do(folder: Path, tmp_path: Path) -> None:
    bundle, test = tmp_path / "b", str(folder / "test.csv")
    run("fit", str(folder / "train.csv"), "--val", str(folder / "val.csv"), "--out", str(bundle), *SMALL)
    page = tmp_path / "page.html"
    assert str(page) in run("report", str(bundle), test, "--out", str(page), "--pictures", "1")
    assert "<html" in page.read_text(encoding="utf-8")
    listed = run("review", str(bundle), test, "--n", "2", "--csv", str(tmp_path / "review.csv"))
    table = pd.read_csv(tmp_path / "review.csv")
    expected = SemanticSegmentor.load(bundle).review(test, 2)
    assert table["row"].tolist() == expected.index.tolist()
    assert table["expected_iou"].tolist() == pytest.approx(expected["expected_iou"].tolist())
    assert all(str(path) in listed for path in expected["image"])
    segmentor = SemanticSegmentor.load(bundle)
    temperature = segmentor.calibrate_temperature(test)
    threshold = segmentor.calibrate_decision_threshold(test, "dice")
    printed = run("calibrate", str(bundle), test, "--threshold", "dice", "--out", str(tmp_path / "other"))
    assert f"temperature  {temperature:.4f}\nthreshold    {threshold:.4f}\n" in printed
    assert SemanticSegmentor.load(tmp_path / "other").threshold_ == threshold
    assert SemanticSegmentor.load(bundle).temperature_ == 1, "the segmentor itself stays as it is"
    assert f"saved in {bundle}" in run("calibrate", str(bundle), test)
    assert SemanticSegmentor.load(bundle).temperature_ == pytest.approx(temperature)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere", "x.csv"], "no saved segmentor"),
        (["review", "nowhere", "x.csv", "--n", "3"], "no saved segmentor"),
        (["calibrate", "nowhere", "x.csv"], "no saved segmentor"),
    ],
)
def test_cli__judging_without_a_segmentor__is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["semseg-automl", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_cli__info_without_bundle__describes_the_machine() -> None:
    assert "GiB" in run("info")


def test_cli__presets__lists_each_with_its_command() -> None:
    printed = run("presets")
    for name in ("auto", "fast", "medium_quality", "high_quality", "best_quality", "conv_lora_paper", "lst"):
        assert f"\n{name}\n" in f"\n{printed}"
    assert printed.count("Command: ") == printed.count("Hardware: ") == printed.count("Expected: ") >= 15


def test_cli__fit_trials__names_what_would_race(folder: Path, tmp_path: Path) -> None:
    arguments = ("fit", str(folder / "train.csv"), "--out", str(tmp_path / "b"), "--trials", "3", "--dry-run", *SMALL)
    assert "search among 3 configurations: plan, baseline, faster_rate" in run(*arguments)


def test_cli__fit_dry_run__prints_the_plan_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    printed = run("fit", str(folder / "train.csv"), "--out", str(tmp_path / "b"), "--dry-run", *SMALL)
    assert "input_size" in printed
    assert not (tmp_path / "b").exists()


def test_cli__predict_with_a_bad_file__writes_the_others_and_says_so(folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    run("fit", str(folder / "train.csv"), "--val", str(folder / "val.csv"), "--out", str(bundle), *SMALL)
    images = tmp_path / "images"
    images.mkdir()
    (images / "bad.png").write_bytes(b"nothing")
    good = Path(pd.read_csv(folder / "test.csv")["image"][0])
    (images / f"good{good.suffix}").write_bytes((folder / good).read_bytes())
    result = CliRunner().invoke(cli.app, ["predict", str(bundle), str(images), "--out", str(tmp_path / "masks")])
    assert result.exit_code == 1
    assert "1 masks" in result.output
    assert "bad.png" in result.output
    assert (tmp_path / "masks" / "good.png").is_file()


def test_cli__demo_on_a_folder__leaves_bundle_masks_and_picture(folder: Path, tmp_path: Path) -> None:
    printed = run("demo", "--data", str(folder), "--out", str(tmp_path), "--time-limit", "60", *SMALL)
    out = tmp_path / folder.name
    assert "iou" in printed
    assert (out / "bundle" / "bundle.yaml").is_file()
    assert len(list((out / "masks").glob("*.png"))) == 3
    assert read_image(out / "overlay.png").shape[1] == 3 * 240


def test_cli__error_of_ours__is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["semseg-automl", "evaluate", str(tmp_path), "x.csv"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "no saved segmentor" in printed


def test_cli__set_without_value__says_how_to_write_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["semseg-automl", "fit", "x.csv", "-s", "optim.lr"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "key=value" in capsys.readouterr().err
