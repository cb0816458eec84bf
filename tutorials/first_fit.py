"""First steps: draw a small data set, fit, look at the decisions, score, predict, save, load.

Run it with ``python tutorials/first_fit.py``; a few seconds, no GPU, no network. For your own images, replace `folder`
by the folder of your ``train.csv``, ``val.csv`` and ``test.csv`` (columns ``image`` and ``label``), drop
``hyperparameters`` and ``max_epochs``, and give ``fit`` a ``time_limit`` in seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from semseg_automl import SemanticSegmentor, draw_dataset


def main(workspace: Path) -> dict[str, float]:
    """Walk through the main job in `workspace` and return the test scores."""
    # 1. Data: here drawn, 24 images with textured blobs and their masks.
    folder = draw_dataset(workspace / "data", kind="binary", train=16, val=4, test=4, size=(96, 96))

    # 2. Decide without training: what the masks hold, and every choice with its reason.
    small = {"model.input_size": 96, "model.decoder_dim": 32, "env.batch_size": 4}
    segmentor = SemanticSegmentor(path=workspace / "segmentor", hyperparameters=small, verbosity=1)
    segmentor.fit(folder / "train.csv", tuning_data=folder / "val.csv", dry_run=True)

    # 3. Fit. The best epoch is kept, in memory and in `path`.
    segmentor.fit(folder / "train.csv", tuning_data=folder / "val.csv", max_epochs=2)
    print(segmentor.history_)

    # 4. Score at each image's own resolution.
    scores = segmentor.evaluate(folder / "test.csv")
    print(scores)

    # 5. Predict: masks in the values of the training masks, one file per row.
    saved = segmentor.predict(folder / "test.csv", save_to=workspace / "masks")
    print(saved)

    # 6. The folder is all that is needed later, on another machine too.
    again = SemanticSegmentor.load(workspace / "segmentor")
    assert again.evaluate(folder / "test.csv") == scores
    return scores


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
