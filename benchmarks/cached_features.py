"""What caching frozen features saves: ``python -m benchmarks.cached_features [--size 1024] [--images 3]``.

Decoder-only training of SAM's decoder on random images with random weights, batch 1: seconds per image of the first
pass, which encodes, and of later ones, which read the cache. Loss, backward pass and optimizer step are included,
reading and augmenting images are not.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from semseg_automl.build import build_method
from semseg_automl.features import FeatureCache
from semseg_automl.losses import CRITERIA
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.sam import SAM_ENCODERS
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.peft import trainable_parameters

PASSES = 4


def main() -> None:
    """Print seconds per image of each pass and the ratio of the first to the median of the later ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="sam_vit_b", choices=list(SAM_ENCODERS))
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--images", type=int, default=3)
    options = parser.parse_args()
    encoder = SAM_ENCODERS[options.encoder]()
    encoder.mark_pretrained()
    build_method("decoder_only", {}).apply(encoder)
    model = SegmentationModel(encoder, MaskDecoder(256, mlp_dim=2048)).train()
    stage = encoder.frozen_stage()
    cache = FeatureCache(model, stage, folder=None, budget=2**32, dtype=torch.float32, on_full=print)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-4)
    images = torch.randint(0, 256, (options.images, 3, options.size, options.size), dtype=torch.uint8)
    masks = torch.randint(0, 2, (options.images, options.size, options.size))
    seconds = []
    for _ in range(PASSES):
        times = []
        for i in range(options.images):
            start = time.perf_counter()
            image = images[i : i + 1]
            output = model.finish(cache.states(torch.tensor([i]), image), stage, image)
            CRITERIA["structure"](output, masks[i : i + 1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times))
        print(f"pass {len(seconds)}: {seconds[-1]:.3f} s per image", flush=True)
    print(f"first / later: {seconds[0] / statistics.median(seconds[1:]):.1f}")


if __name__ == "__main__":
    main()
