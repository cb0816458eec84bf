"""Encoder and mask decoder as one deployable module: pixels in, logits out. No loss, no threshold."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.errors import ConfigError
from semseg_automl.models.encoder import Encoder, EncoderState, auxiliary_loss
from semseg_automl.models.mask_decoder import MaskDecoder, SegmentationOutput


class SegmentationModel(nn.Module):
    """Pixels to logits.

    Args:
        encoder: the image encoder; normalisation is its own.
        mask_decoder: reads the encoder's embeddings.
    """

    def __init__(self, encoder: Encoder, mask_decoder: MaskDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_decoder = mask_decoder

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Segment ``images (B, 3, H, W)``, RGB, 0..255, of any number type.

        Raises:
            ConfigError: a side is not divisible by the encoder's stride.
        """
        normalised = self.normalise(images)
        output: SegmentationOutput = self.mask_decoder(self.encoder(normalised), normalised)
        return output

    def begin(self, images: Tensor, stage: int) -> EncoderState:
        """Encode ``images (B, 3, H, W)``, 0..255, up to `stage` of the encoder; see `Encoder`."""
        return self.encoder.begin(self.normalise(images), stage)

    def finish(self, state: EncoderState, stage: int, images: Tensor) -> SegmentationOutput:
        """Go on from what `begin` returned for the same `stage` and ``images`` to what `forward` returns."""
        output: SegmentationOutput = self.mask_decoder(self.encoder.finish(state, stage), self.normalise(images))
        return output

    def normalise(self, images: Tensor) -> Tensor:
        """Bring ``images (B, 3, H, W)``, 0..255, to the encoder's mean and deviation.

        Raises:
            ConfigError: a side is not divisible by the encoder's stride.
        """
        stride = self.encoder.stride
        height, width = images.shape[-2:]
        if height % stride or width % stride:
            raise ConfigError(f"the input is {height} x {width} pixels; both sides must be divisible by {stride}.")
        return (images.float() - self.encoder.pixel_mean) / self.encoder.pixel_std

    def aux_loss(self) -> Tensor:
        """Sum the auxiliary losses of the last forward pass, a scalar."""
        return auxiliary_loss(self)


def semantic_scores(output: SegmentationOutput, size: tuple[int, int]) -> Tensor:
    """Turn logits into class scores: the only place where that happens.

    Args:
        output: what the model gave for a batch.
        size: height and width of the scores; the logits are upsampled to it, bilinearly.

    Returns:
        ``(B, 1, *size)`` foreground probability for one mask token; ``(B, K, *size)`` class scores otherwise: the
        softmax over per-class tokens, or ``sum_q softmax(class)_qc sigmoid(mask)_q`` (Mask2Former, Cheng et al.,
        2022) where there is a classification layer.
    """
    logits = F.interpolate(output.mask_logits.float(), size=size, mode="bilinear", align_corners=False)
    if output.class_logits is not None:
        classes = output.class_logits.float().softmax(dim=-1)[..., :-1]
        batch, queries, height, width = logits.shape
        mixed = classes.transpose(1, 2) @ logits.sigmoid().view(batch, queries, height * width)
        return mixed.view(batch, -1, height, width)
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


def hard_labels(scores: Tensor, threshold: float = 0.5) -> Tensor:
    """Decide on a class per pixel: the threshold for one map of foreground probability, the largest score otherwise.

    Args:
        scores: ``(C, H, W)`` of one image, from `semantic_scores`.
        threshold: foreground probability above which a pixel is foreground.

    Returns:
        ``(H, W)`` int64 class indices.
    """
    return (scores[0] > threshold).long() if scores.shape[0] == 1 else scores.argmax(dim=0)
