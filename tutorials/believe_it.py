"""How far to believe a fit: check the data, compare two methods, look where it fails, choose a threshold, report.

Run it with ``python tutorials/believe_it.py``; about half a minute, no GPU, no network. It goes on where
``first_fit.py`` ends; for your own images, replace `folder` by the folder of your ``train.csv``, ``val.csv`` and
``test.csv``, and give ``fit`` a ``time_limit`` in seconds instead of ``max_epochs``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from semseg_automl import SemanticSegmentor, check_data, compare, comparison_grid, draw_dataset

SMALL: dict[str, Any] = {"model.input_size": 96, "model.decoder_dim": 32, "env.batch_size": 4}


def fitted(folder: Path, path: Path, **changed: Any) -> SemanticSegmentor:
    """Fit two short epochs with some settings changed."""
    segmentor = SemanticSegmentor(path=path, hyperparameters=SMALL | changed, verbosity=0)
    return segmentor.fit(folder / "train.csv", folder / "val.csv", max_epochs=2)


def main(workspace: Path) -> dict[str, float]:
    """Walk through the judging of a fit in `workspace` and return the test scores."""
    folder = draw_dataset(workspace / "data", kind="binary", train=16, val=6, test=6, size=(96, 96))
    train, val, test = (folder / f"{name}.csv" for name in ("train", "val", "test"))

    # 1. Before any fit: unusable rows, copies across the splits, objects too small for the network, odd masks.
    print(check_data(train, val, test, path=workspace / "check.html"))

    # 2. Two fits that differ in one thing. Is the difference chance? Each image is compared with itself.
    light, strong = (
        fitted(folder, workspace / name, **{"data.augmentation": name}) for name in ("light", "strong")
    )
    print(compare(light, strong, test, ["iou", "s_measure"]))
    comparison_grid(test, {"light": light, "strong": strong}, workspace / "grid.png")

    # 3. Figures with 95 % intervals over images; then where it fails: by the size of the objects, and image by image.
    print(light.evaluate(test, intervals=True))
    print(light.evaluate(test, ["iou"], by="object_size"))
    worst = light.evaluate(test, ["iou"], return_per_image=True).sort_values("iou").head(3)
    print(worst)

    # 4. Probabilities to believe, and the threshold that suits the figure you care for; both chosen on validation rows.
    print("temperature", light.calibrate_temperature(val))
    print("threshold", light.calibrate_decision_threshold(val, "iou"))

    # 5. What to look at or to label next, and which masks to doubt.
    print(light.review(test, n=3))
    print(light.find_label_issues(train).head(3))

    # 6. All of it on one page that needs no network.
    print(light.report(test, workspace / "report.html"))
    scores: dict[str, float] = light.evaluate(test)
    return scores


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
