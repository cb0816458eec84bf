"""Prediction: images in, class scores or labels at each image's own size out, one by one, in the order of the table.

Memory holds one micro-batch whatever the number of images, and for labels no score map of a whole large image either:
it is finished in parts, each decided on and forgotten. Writing files is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg_automl.calibration import tempered
from semseg_automl.data.crops import cut
from semseg_automl.data.images import read_image
from semseg_automl.data.table import MaskTable
from semseg_automl.data.transforms import Geometry, resize
from semseg_automl.errors import ConfigError, DataError, UnsupportedCombination
from semseg_automl.models.attention_choice import choose_attention
from semseg_automl.models.segmentation_model import SegmentationModel, hard_labels, semantic_scores
from semseg_automl.tiling import Block, Size, TileGrid, blend, gather, tile_grid

OnError = Literal["raise", "report"]
MetricSize = Literal["original", "model"]

T = TypeVar("T")
Collect = Callable[[Size, Iterator[Block]], T]
"""Makes a prediction of an image's height and width and its scores, block by block."""

STRIP_ELEMENTS = 2**25
"""Scores, of all classes together, that are brought to an image's own size at once; 128 MiB."""


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
        batch_size: images, or tiles of one image, per forward pass.
        device: where the network is.
        temperature: what the logits of all scores are divided by; `semseg_automl.calibration.tempered`.
        tile: height and width, in an image's own pixels, of the tiles it is seen in; None for whole images.
        mirrored: average the scores with those of the mirrored image, at twice the time.
    """

    model: SegmentationModel
    input_size: Size
    batch_size: int
    device: torch.device
    temperature: float = 1.0
    tile: Size | None = None
    mirrored: bool = False

    def scores(
        self, table: MaskTable, *, on_error: OnError = "raise", size: MetricSize = "original"
    ) -> Iterator[Tensor | FailedPrediction]:
        """Yield for each row its class scores ``(C, H, W)``, on the CPU.

        Args:
            table: images; masks are not read.
            on_error: ``raise`` stops at an image that cannot be read, ``report`` yields a `FailedPrediction` there.
            size: ``original`` for the image's own, ``model`` for that of the network's input.

        Raises:
            ConfigError: `on_error` or `size` is none of these.
            UnsupportedCombination: `size` is ``model``, and images are seen in tiles.
            DataError: an image cannot be read and `on_error` is ``raise``.
        """
        if size not in ("original", "model"):
            raise ConfigError(f"the size of scores is '{size}'; allowed: original, model.")
        if size == "model" and self.tile is not None:
            raise UnsupportedCombination(
                "scores at the size of the network's input are asked for, but images are seen in tiles, of which "
                "there are several inputs. Use the original size, or fit with data.tiling='off'."
            )
        return self._predict(table, on_error, _all_scores, own_size=size == "original")

    def labels(
        self, table: MaskTable, *, threshold: float, on_error: OnError = "raise"
    ) -> Iterator[NDArray[np.uint8] | FailedPrediction]:
        """Yield for each row its class indices ``(H, W)`` at the image's own size: what `scores` would decide on.

        Args:
            table: images; masks are not read.
            threshold: foreground probability above which a pixel is foreground.
            on_error: as for `scores`.

        Raises:
            ConfigError: `on_error` is unknown.
            DataError: an image cannot be read and `on_error` is ``raise``.
        """

        def collect(size: Size, blocks: Iterator[Block]) -> NDArray[np.uint8]:
            labels = np.empty(size, dtype=np.uint8)
            for block in blocks:
                labels[block.place] = hard_labels(block.scores, threshold).to(torch.uint8).cpu().numpy()
            return labels

        return self._predict(table, on_error, collect)

    def _predict(
        self, table: MaskTable, on_error: OnError, collect: Collect[T], *, own_size: bool = True
    ) -> Iterator[T | FailedPrediction]:
        if on_error not in ("raise", "report"):
            raise ConfigError(f"on_error is '{on_error}'; allowed: raise, report.")
        self._choose_attention()
        if self.tile is not None:
            return self._tiled(table, on_error, collect, self.tile)
        return self._whole(table, on_error, collect, own_size)

    def _choose_attention(self) -> None:
        """Give each block the form of attention that is faster on this device; measured once per process."""
        choose_attention(
            self.model.encoder,
            self.input_size,
            batch=self.batch_size,
            device=self.device,
            dtype=next(self.model.parameters()).dtype,
            training=False,
        )

    def _whole(
        self, table: MaskTable, on_error: OnError, collect: Collect[T], own_size: bool
    ) -> Iterator[T | FailedPrediction]:
        """Predict whole images, a micro-batch at a time."""
        for start in range(0, len(table), self.batch_size):
            batch: list[Geometry | FailedPrediction] = []
            inputs: list[NDArray[np.uint8]] = []
            for row in range(start, min(start + self.batch_size, len(table))):
                image = _read(table, row, on_error)
                if isinstance(image, FailedPrediction):
                    batch.append(image)
                    continue
                resized, geometry = resize(image, self.input_size)
                del image  # a large one is not to wait for the network beside its small copy
                inputs.append(resized)
                batch.append(geometry if own_size else Geometry(self.input_size, self.input_size))
            scores = iter(self._run(inputs))
            for entry in batch:
                if isinstance(entry, FailedPrediction):
                    yield entry
                else:
                    yield collect(entry.original_size, self._tempered(_strips(entry, next(scores))))

    def _tiled(
        self, table: MaskTable, on_error: OnError, collect: Collect[T], tile: Size
    ) -> Iterator[T | FailedPrediction]:
        """Predict images in tiles, a micro-batch of tiles at a time."""
        for row in range(len(table)):
            yield self._in_tiles(table, row, on_error, collect, tile)

    def _in_tiles(
        self, table: MaskTable, row: int, on_error: OnError, collect: Collect[T], tile: Size
    ) -> T | FailedPrediction:
        image = _read(table, row, on_error)
        if isinstance(image, FailedPrediction):
            return image
        size = image.shape[0], image.shape[1]
        grid = tile_grid(size, tile)
        return collect(size, self._tempered(blend(grid, self._tile_scores(image, grid))))

    def _tile_scores(self, image: NDArray[np.uint8], grid: TileGrid) -> Iterator[Tensor]:
        """Yield the scores ``(C, *grid.tile)`` of each tile."""
        corners = list(grid.corners())
        for start in range(0, len(corners), self.batch_size):
            tiles = [
                resize(cut(image, corner, grid.tile), self.input_size)
                for corner in corners[start : start + self.batch_size]
            ]
            for (_, geometry), scores in zip(tiles, self._run([tile for tile, _ in tiles]), strict=True):
                yield geometry.undo(scores)

    @torch.inference_mode()
    def _run(self, inputs: Sequence[NDArray[np.uint8]]) -> Iterable[Tensor]:
        """Return the scores ``(B, C, h, w)`` of images ``(h, w, 3)`` of the input size."""
        if not inputs:
            return ()
        batch = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in inputs]).to(self.device)
        scores = semantic_scores(self.model(batch), self.input_size)
        if self.mirrored:
            scores = (scores + semantic_scores(self.model(batch.flip(-1)), self.input_size).flip(-1)) / 2
        return scores

    def _tempered(self, blocks: Iterable[Block]) -> Iterator[Block]:
        return (Block(b.top, b.left, tempered(b.scores, self.temperature)) for b in blocks)


def _read(table: MaskTable, row: int, on_error: OnError) -> NDArray[np.uint8] | FailedPrediction:
    name = table.row_name(row)
    try:
        return read_image(table.images[row], name=name, channels=table.channels)
    except DataError as error:
        if on_error == "raise":
            raise
        return FailedPrediction(name, str(error))


def _strips(geometry: Geometry, scores: Tensor) -> Iterator[Block]:
    """Bring scores ``(C, h, w)`` to the image's own size: at once or, where that is large, some rows at a time."""
    height, width = geometry.original_size
    rows = max(1, STRIP_ELEMENTS // (scores.shape[0] * width))
    if rows >= height:
        yield Block(0, 0, geometry.undo(scores))
        return
    for start in range(0, height, rows):
        yield Block(start, 0, geometry.undo_rows(scores, start, min(start + rows, height)))


def _all_scores(size: Size, blocks: Iterator[Block]) -> Tensor:
    return gather(size, (Block(b.top, b.left, b.scores.cpu()) for b in blocks))
