"""``semseg-automl fit | evaluate | predict | leaderboard | report | review | calibrate | check | ...``, from a shell.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from semseg_automl.version import __version__

app = typer.Typer(
    name="semseg-automl",
    help="From a table of images and masks to a fitted semantic segmenter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Settings = Annotated[list[str] | None, typer.Option("--set", "-s", help="A setting, as optim.lr=0.001; repeatable.")]
Columns = typer.Option(help="Column of the table.")
ColourMap = Annotated[Path | None, typer.Option(help="File that names the colours of the masks.")]
Ignored = Annotated[str | None, typer.Option(help="Value, or #rrggbb, of pixels without a label.")]
Chosen = Annotated[str | None, typer.Option(help="Channels of the images to take as R,G,B, or one; from 0, as 3,2,1.")]
LABELLED = "CSV with columns image and label, JSON of COCO, data.yaml of YOLO, or a folder of annotations"


def _whole_numbers(text: str | None, option: str) -> list[int] | None:
    """Parse numbers with commas between them."""
    from semseg_automl.errors import ConfigError

    if text is None:
        return None
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        raise ConfigError(f"{option} got '{text}'; write whole numbers with commas between them, such as 2,1,0.")
    return [int(part) for part in text.split(",")]


def _label(text: str | None) -> int | str | None:
    """Parse a value of a mask: a number, or else a colour."""
    return int(text) if text is not None and re.fullmatch(r"-?\d{1,10}", text) else text


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    """Parse ``key=value`` pairs, values as YAML."""
    import yaml

    from semseg_automl.errors import ConfigError

    parsed: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(f"--set got '{pair}'; write key=value, for example optim.lr=0.001.")
        parsed[key] = yaml.safe_load(value)
    return parsed


def _files(
    image: str, label: str, color_map: Path | None, ignore_label: str | None, channels: str | None
) -> dict[str, Any]:
    """Return what the user said of the files, as `SemanticSegmentor` and `check_data` take it."""
    chosen = _whole_numbers(channels, "--channels")
    said = {"color_map": color_map, "ignore_label": _label(ignore_label), "channels": chosen}
    return {"image": image, "label": label, **said}


@app.command()
def fit(
    train: Annotated[Path, typer.Argument(help=f"Training rows: {LABELLED}.")],
    val: Annotated[Path | None, typer.Option(help="Validation rows; held out of the others if absent.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to save the segmentor in.")] = Path("runs/segmentor"),
    preset: Annotated[str, typer.Option(help="Name of a preset.")] = "auto",
    checkpoint: Annotated[Path | None, typer.Option(help="Pretrained encoder weights.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds for everything.")] = None,
    trials: Annotated[int | None, typer.Option(help="Configurations to race before the best is fitted.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a fit that was cut off in --out.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    image: Annotated[str, Columns] = "image",
    label: Annotated[str, Columns] = "label",
    color_map: ColourMap = None,
    ignore_label: Ignored = None,
    channels: Chosen = None,
    dry_run: Annotated[bool, typer.Option(help="Print task and plan, train nothing.")] = False,
    settings: Settings = None,
) -> None:
    """Fit a segmentor to a table and save it."""
    from semseg_automl.estimator import SemanticSegmentor

    hyperparameters = _settings(settings)
    if checkpoint is not None:
        hyperparameters["model.checkpoint"] = str(checkpoint)
    files = _files(image, label, color_map, ignore_label, channels)
    segmentor = SemanticSegmentor(path=out, presets=preset, hyperparameters=hyperparameters, **files)
    tuned = None if trials is None else {"num_trials": trials}
    rest: dict[str, Any] = {"hyperparameter_tune_kwargs": tuned, "resume": resume, "dry_run": dry_run}
    segmentor.fit(train, val, time_limit=time_limit, seed=seed, **rest)


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Folder that fit wrote.")],
    data: Annotated[Path, typer.Argument(help=f"Labelled rows: {LABELLED}.")],
    metric: Annotated[list[str] | None, typer.Option(help="Metric name; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a saved segmentor on labelled images."""
    from semseg_automl.estimator import SemanticSegmentor

    figures = SemanticSegmentor.load(bundle).evaluate(data, metric)
    if as_json:
        print(json.dumps(figures))
        return
    width = max(len(name) for name in figures)
    print("\n".join(f"{name:{width}}  {value:.4f}" for name, value in figures.items()))


@app.command()
def leaderboard(
    bundle: Annotated[Path, typer.Argument(help="Folder that fit --trials wrote.")],
    data: Annotated[Path | None, typer.Argument(help=f"Rows to judge all on: {LABELLED}.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metric name; repeatable.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Table to write as well.")] = None,
) -> None:
    """List every configuration that the search of a fit tried, the winner first."""
    from semseg_automl.estimator import SemanticSegmentor

    board = SemanticSegmentor.load(bundle).leaderboard(data, metric)
    print(board.to_string(float_format="{:.3f}".format))
    if csv is not None:
        board.to_csv(csv)


@app.command()
def report(
    bundle: Annotated[Path, typer.Argument(help="Folder that fit wrote.")],
    data: Annotated[Path, typer.Argument(help=f"Labelled rows: {LABELLED}.")],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("report.html"),
    pictures: Annotated[int, typer.Option(help="Of the worst, the median and the best images each.")] = 4,
) -> None:
    """Judge a saved segmentor on labelled images, in one HTML page that needs no network."""
    from semseg_automl.estimator import SemanticSegmentor

    print(f"page: {SemanticSegmentor.load(bundle).report(data, out, pictures=pictures)}")


@app.command()
def review(
    bundle: Annotated[Path, typer.Argument(help="Folder that fit wrote.")],
    data: Annotated[Path, typer.Argument(help="CSV with an image column, a folder, annotations, or one image.")],
    n: Annotated[int, typer.Option("--n", "-n", help="How many to list.")] = 20,
    csv: Annotated[Path | None, typer.Option(help="Table to write as well.")] = None,
) -> None:
    """List the images to look at, or to label, first: those whose predictions are likely to be the worst."""
    from semseg_automl.estimator import SemanticSegmentor

    listed = SemanticSegmentor.load(bundle).review(data, n)
    print(listed.to_string(float_format="{:.3f}".format))
    if csv is not None:
        listed.to_csv(csv, index_label="row")


@app.command()
def calibrate(
    bundle: Annotated[Path, typer.Argument(help="Folder that fit wrote.")],
    data: Annotated[Path, typer.Argument(help=f"Labelled rows that were not trained on: {LABELLED}.")],
    threshold: Annotated[str | None, typer.Option(help="Metric to choose the decision threshold by.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to save in; else the segmentor's own.")] = None,
) -> None:
    """Make probabilities believable, perhaps choose the decision threshold, and save both."""
    from semseg_automl.estimator import SemanticSegmentor

    segmentor = SemanticSegmentor.load(bundle)
    segmentor.calibrate_temperature(data)
    if threshold is not None:
        segmentor.calibrate_decision_threshold(data, threshold)
    print(f"temperature  {segmentor.temperature_:.4f}\nthreshold    {segmentor.threshold_:.4f}")
    print(f"saved in {segmentor.save(bundle if out is None else out)}")


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="Folder that fit wrote.")],
    data: Annotated[Path, typer.Argument(help="CSV with an image column, a folder, annotations, or one image.")],
    out: Annotated[Path, typer.Option(help="Folder for the masks and predictions.csv.")] = Path("masks"),
    format: Annotated[str, typer.Option(help="same-as-labels, index, overlay or probability.")] = "same-as-labels",
    resume: Annotated[bool, typer.Option(help="Keep the files of an earlier run that was stopped.")] = False,
    on_error: Annotated[str, typer.Option(help="raise, or report and go on.")] = "report",
) -> None:
    """Write one file per image: its mask in the values of the training masks, or as --format says."""
    from semseg_automl.estimator import SemanticSegmentor

    options: dict[str, Any] = {"format": format, "resume": resume, "on_error": on_error}
    saved = SemanticSegmentor.load(bundle).predict(data, save_to=out, **options)
    saved.to_csv(out / "predictions.csv", index=True, index_label="row")
    failed = saved[saved["error"].notna()]
    print(f"{len(saved) - len(failed)} masks in {out}, {len(failed)} rows failed; table: {out / 'predictions.csv'}")
    for reason in failed["error"]:
        print(f"  {reason}")
    if len(failed):
        raise typer.Exit(1)


@app.command()
def check(
    train: Annotated[Path, typer.Argument(help=f"Training rows: {LABELLED}.")],
    val: Annotated[Path | None, typer.Option(help="Validation rows.")] = None,
    test: Annotated[Path | None, typer.Option(help="Test rows.")] = None,
    html: Annotated[Path | None, typer.Option(help="Page to write, with pictures.")] = None,
    image: Annotated[str, Columns] = "image",
    label: Annotated[str, Columns] = "label",
    color_map: ColourMap = None,
    ignore_label: Ignored = None,
    channels: Chosen = None,
) -> None:
    """Check files, classes, duplicates and leaks before fitting; exit code 1 when something is wrong."""
    from semseg_automl.checking import check_data

    report = check_data(train, val, test, path=html, **_files(image, label, color_map, ignore_label, channels))
    print(report)
    if html is not None:
        print(f"page: {html}")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="Folder with train.csv, val.csv, test.csv; else drawn.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bundles, masks and pictures.")] = Path("runs/demo"),
    time_limit: Annotated[float | None, typer.Option(help="Seconds of fitting per data set.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Pretrained encoder weights.")] = None,
    seed: Annotated[int, typer.Option(help="Of drawing and fitting.")] = 0,
    settings: Settings = None,
) -> None:
    """Run the main job end to end: fit, evaluate, predict, bundle, picture, scores."""
    from semseg_automl.demo import run_demo

    hyperparameters = _settings(settings)
    if checkpoint is not None:
        hyperparameters["model.checkpoint"] = str(checkpoint)
    limit = time_limit if time_limit is not None else (90.0 if data is None else 600.0)
    run_demo(data, out=out, time_limit=limit, hyperparameters=hyperparameters, seed=seed)


@app.command()
def presets() -> None:
    """List the presets: what each is for, its source, command, hardware and expected score."""
    from semseg_automl.config import list_presets

    for name, header in list_presets().items():
        print(f"{name}\n" + "\n".join(f"  {line}" for line in header.splitlines()) + "\n")


@app.command()
def info(
    bundle: Annotated[Path | None, typer.Argument(help="Folder that fit wrote; else this machine.")] = None,
) -> None:
    """Describe a saved segmentor, or this machine."""
    if bundle is not None:
        from semseg_automl.estimator import SemanticSegmentor
        from semseg_automl.forecast import compared
        from semseg_automl.peft.usage import usage_summary

        segmentor = SemanticSegmentor.load(bundle)
        summary = segmentor.fit_summary()
        summary.pop("history")
        usage, foretold = summary.pop("expert_usage"), compared(summary.pop("forecast"))
        print(segmentor.task_)
        print("\n".join(f"{key:22} {value}" for key, value in summary.items()))
        if foretold:
            print(f"it took {foretold}")
        if usage:
            print(usage_summary(usage))
        print(segmentor.plan_)
        return
    from semseg_automl.hardware import detect_hardware

    hardware = detect_hardware()
    print(f"semseg_automl {__version__}")
    print(f"{hardware.name}, {hardware.memory / 2**30:.1f} GiB, bfloat16 {'fast' if hardware.bf16 else 'not fast'}")


def main() -> None:
    """Run the command line; an error of ours is one line and exit code 2, Ctrl-C exit code 130."""
    from semseg_automl.errors import SemsegError

    try:
        app()
    except SemsegError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted {interrupt}".strip(), file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
