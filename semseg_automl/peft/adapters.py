"""Methods with small networks of their own: Adapter behind attention and MLP, SAM-Adapter before each block."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.errors import ConfigError
from semseg_automl.models.encoder import TOKENS, Encoder, Prompter
from semseg_automl.peft.base import PeftMethod, freeze_pretrained

HIGH_PASS = 0.25
"""Share of the spectrum's area, at its low frequencies, that SAM-Adapter takes out of the image."""


def check_width(setting: str, width: int, largest: int) -> None:
    """Raise `ConfigError` naming the setting unless ``1 <= width <= largest``."""
    if not 1 <= width <= largest:
        raise ConfigError(f"{setting} is {width}; allowed here: 1 to {largest}.")


class AdapterLinear(nn.Module):
    """A frozen linear layer and a bottleneck behind it: ``h = W0 x + b``, then ``h + Up(GELU(Down(h)))``.

    ``Up`` starts at zero, so the layer starts as the frozen one, bit for bit (the paper starts it near zero).

    Args:
        base: the layer to adapt; it is kept, not copied.
        width: of the bottleneck.
    """

    def __init__(self, base: nn.Linear, width: int) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        self.down = nn.Linear(base.out_features, width, device=device)
        self.up = nn.Linear(width, base.out_features, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        projected: Tensor = self.base(x)
        adapted: Tensor = projected + self.up(F.gelu(self.down(projected)))
        return adapted


class Adapter(PeftMethod):
    """Bottlenecks behind attention and MLP of every block (Houlsby et al., ICML 2019, arXiv 1902.00751, section 2.1).

    Args:
        width: of the bottlenecks; 2 in Conv-LoRA's table.
    """

    name: ClassVar[str] = "adapter"
    needs: ClassVar[frozenset[str]] = frozenset({"proj", "fc2"})
    not_mergeable: ClassVar[str] = "a GELU stands between the two layers of each bottleneck"

    def __init__(self, *, width: int = 2) -> None:
        check_width("optim.adapter.width", width, 2**16)
        self.width = width

    def _adapt(self, encoder: Encoder) -> None:
        check_width("optim.adapter.width", self.width, encoder.embed_dim)
        freeze_pretrained(encoder)
        for seams in encoder.seams():
            for part in ("proj", "fc2"):
                seams[part].replace(AdapterLinear(seams[part].module, self.width))


def high_frequencies(images: Tensor, share: float = HIGH_PASS) -> Tensor:
    """Return the magnitude of images without their low frequencies, ``(B, C, H, W)``.

    Args:
        images: ``(B, C, H, W)``.
        share: of the spectrum's area, a square around frequency zero, that is taken out.
    """
    height, width = images.shape[-2:]
    half = int((height * width * share) ** 0.5 // 2)
    rows, columns = (torch.fft.fftfreq(side, d=1 / side, device=images.device) for side in (height, width))
    low = ((-half <= rows) & (rows < half))[:, None] & (-half <= columns) & (columns < half)
    with torch.autocast(device_type=images.device.type, enabled=False):  # no half-precision transform on a processor
        spectrum = torch.fft.fft2(images.float()) * ~low
        magnitude: Tensor = torch.fft.ifft2(spectrum).real.abs()
        return magnitude


class PromptGenerator(Prompter):
    """SAM-Adapter's prompts: ``P_i = Shared(GELU(Tune_i(F_image + F_tokens)))``, added to the tokens before block i.

    ``F_image`` embeds patches of the image's high frequencies, ``F_tokens`` the first block's tokens. ``Shared`` starts
    at zero, so that nothing is added before the first step (the published code starts it at random).

    Args:
        dim: width of the tokens.
        width: of the features.
        depth: number of blocks.
        stride: pixels per token and side.
    """

    def __init__(self, dim: int, width: int, depth: int, stride: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, kernel_size=stride, stride=stride)
        self.embedding = nn.Linear(dim, width)
        self.tune = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.shared = nn.Linear(width, dim)
        nn.init.zeros_(self.shared.weight)
        nn.init.zeros_(self.shared.bias)

    def prepare(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return features ``(B, H, W, width)`` of normalised ``images`` and the first ``tokens (B, H, W, dim)``."""
        patches: Tensor = self.patch_embed(high_frequencies(images)).permute(0, 2, 3, 1)
        features: Tensor = patches + self.embedding(tokens)
        return features

    def forward(self, index: int, features: Tensor) -> Tensor:
        """Return the prompt of block `index`, ``(B, H, W, dim)``."""
        prompt: Tensor = self.shared(F.gelu(self.tune[index](features)))
        return prompt


class SamAdapter(PeftMethod):
    """Prompts from the image's high frequencies (Chen et al., "SAM-Adapter", ICCV workshops 2023, arXiv 2304.09148).

    Section 3.2; the prompt generator follows Liu et al., "Explicit Visual Prompting", CVPR 2023, section 3.2.

    Args:
        width: of the features; None for a sixteenth of the encoder's.
    """

    name: ClassVar[str] = "sam_adapter"
    needs: ClassVar[frozenset[str]] = frozenset({TOKENS})
    not_mergeable: ClassVar[str] = "its prompts depend on the image"

    def __init__(self, *, width: int | None = None) -> None:
        check_width("optim.sam_adapter.width", 1 if width is None else width, 2**16)
        self.width = width

    def _adapt(self, encoder: Encoder) -> None:
        width = max(1, encoder.embed_dim // 16) if self.width is None else self.width
        check_width("optim.sam_adapter.width", width, encoder.embed_dim)
        freeze_pretrained(encoder)
        with torch.device(next(encoder.parameters()).device):
            encoder.prompter = PromptGenerator(encoder.embed_dim, width, len(encoder.blocks), encoder.stride)
