"""``semseg-automl fit | evaluate | predict | check | demo | info``: the estimator's steps from a shell.

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
LABELLED = "CSV with columns image and label, JSON of COCO, data.yaml of YOLO, or a folder of annotations"


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


@app.command()
def fit(
    train: Annotated[Path, typer.Argument(help=f"Training rows: {LABELLED}.")],
    val: Annotated[Path | None, typer.Option(help="Validation rows; held out of the others if absent.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to save the segmentor in.")] = Path("runs/segmentor"),
    preset: Annotated[str, typer.Option(help="Name of a preset.")] = "auto",
    checkpoint: Annotated[Path | None, typer.Option(help="Pretrained encoder weights.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds for everything.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    image: Annotated[str, Columns] = "image",
    label: Annotated[str, Columns] = "label",
    color_map: Annotated[Path | None, typer.Option(help="File that names the colours of the masks.")] = None,
    ignore_label: Annotated[str | None, typer.Option(help="Value, or #rrggbb, of pixels without a label.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print task and plan, train nothing.")] = False,
    settings: Settings = None,
) -> None:
    """Fit a segmentor to a table and save it."""
    from semseg_automl.estimator import SemanticSegmentor

    hyperparameters = _settings(settings)
    if checkpoint is not None:
        hyperparameters["model.checkpoint"] = str(checkpoint)
    number = ignore_label is not None and re.fullmatch(r"-?\d{1,10}", ignore_label)
    ignored = int(number[0]) if number else ignore_label
    masks: dict[str, Any] = {"image": image, "label": label, "color_map": color_map, "ignore_label": ignored}
    segmentor = SemanticSegmentor(path=out, presets=preset, hyperparameters=hyperparameters, **masks)
    segmentor.fit(train, val, time_limit=time_limit, seed=seed, dry_run=dry_run)


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
    train: Annotated[Path, typer.Argument(help="CSV of training rows, columns image and label.")],
    val: Annotated[Path | None, typer.Option(help="CSV of validation rows.")] = None,
    test: Annotated[Path | None, typer.Option(help="CSV of test rows.")] = None,
    html: Annotated[Path | None, typer.Option(help="Page to write, with pictures.")] = None,
    image: Annotated[str, Columns] = "image",
    label: Annotated[str, Columns] = "label",
) -> None:
    """Check files, classes, duplicates and leaks before fitting; exit code 1 when something is wrong."""
    from semseg_automl.checking import check_data

    report = check_data(train, val, test, image=image, label=label, path=html)
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
def info(
    bundle: Annotated[Path | None, typer.Argument(help="Folder that fit wrote; else this machine and presets.")] = None,
) -> None:
    """Describe a saved segmentor, or this machine and the presets."""
    if bundle is not None:
        from semseg_automl.estimator import SemanticSegmentor
        from semseg_automl.peft.usage import usage_summary

        segmentor = SemanticSegmentor.load(bundle)
        summary = segmentor.fit_summary()
        summary.pop("history")
        usage = summary.pop("expert_usage")
        print(segmentor.task_)
        print("\n".join(f"{key:22} {value}" for key, value in summary.items()))
        if usage:
            print(usage_summary(usage))
        print(segmentor.plan_)
        return
    from semseg_automl.config import list_presets
    from semseg_automl.hardware import detect_hardware

    hardware = detect_hardware()
    print(f"semseg_automl {__version__}")
    print(f"{hardware.name}, {hardware.memory / 2**30:.1f} GiB, bfloat16 {'fast' if hardware.bf16 else 'not fast'}")
    for name, header in list_presets().items():
        print(f"\n{name}\n" + "\n".join(f"  {line}" for line in header.splitlines()))


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
