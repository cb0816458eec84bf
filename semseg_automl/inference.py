"""Prediction: images in, class scores at each image's own size out, one by one, in the order of the table.

Memory holds one micro-batch whatever the number of images. Deciding on classes and writing files is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from semseg_automl.data.images import read_image
from semseg_automl.data.table import MaskTable
from semseg_automl.data.transforms import Geometry, resize
from semseg_automl.errors import ConfigError, DataError
from semseg_automl.models.segmentation_model import SegmentationModel, semantic_scores

OnError = Literal["raise", "report"]


@dataclass(frozen=True)
class FailedPrediction:
    """Stands in the place of a row that could not be predicted.

    Attributes:
        row: the row's name, with its path.
        reason: what was wrong and what to do.
    """

    row: str
    reason: str


@dataclass
class Predictor:
    """A network ready for prediction.

    Args:
        model: in evaluation mode, on `device`.
        input_size: height and width images are resized to, in pixels.
        batch_size: images per forward pass.
        device: where the network is.
    """

    model: SegmentationModel
    input_size: tuple[int, int]
    batch_size: int
    device: torch.device

    def scores(self, table: MaskTable, *, on_error: OnError = "raise") -> Iterator[Tensor | FailedPrediction]:
        """Yield for each row its class scores ``(C, H, W)`` at the image's own size, on the CPU.

        Args:
            table: images; masks are not read.
            on_error: ``raise`` stops at an image that cannot be read, ``report`` yields a `FailedPrediction` there.

        Raises:
            ConfigError: `on_error` is neither.
            DataError: an image cannot be read and `on_error` is ``raise``.
        """
        if on_error not in ("raise", "report"):
            raise ConfigError(f"on_error is '{on_error}'; allowed: raise, report.")
        for start in range(0, len(table), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(table)))
            failed: dict[int, FailedPrediction] = {}
            inputs: list[Tensor] = []
            geometries: list[Geometry] = []
            for row in rows:
                name = table.row_name(row)
                try:
                    image = read_image(table.images[row], name=name)
                except DataError as error:
                    if on_error == "raise":
                        raise
                    failed[row] = FailedPrediction(name, str(error))
                    continue
                resized, geometry = resize(image, self.input_size)
                inputs.append(torch.from_numpy(resized).permute(2, 0, 1))
                geometries.append(geometry)
            done = iter(self._run(inputs, geometries))
            for row in rows:
                yield failed[row] if row in failed else next(done)

    @torch.inference_mode()
    def _run(self, inputs: Sequence[Tensor], geometries: Sequence[Geometry]) -> list[Tensor]:
        """Score images of the input size and bring the scores back to each one's own size."""
        if not inputs:
            return []
        scores = semantic_scores(self.model(torch.stack(list(inputs)).to(self.device)), self.input_size)
        return [geometry.undo(scores[i]).cpu() for i, geometry in enumerate(geometries)]
