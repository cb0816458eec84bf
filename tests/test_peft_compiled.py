"""Every fine-tuning method under ``torch.compile``: one graph, the same output; over METHODS."""

from __future__ import annotations

import pytest
import torch

from semseg_automl.build import build_method
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft import METHODS


# torch's tracer instantiates autograd functions, which torch itself warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_method__compiled__is_one_graph_with_the_same_output(method: str) -> None:
    encoder = TinyViT(embed_dim=32, depth=1, num_heads=2, out_channels=32, window_size=3, grid=4)
    encoder.mark_pretrained()
    build_method(method, {}).apply(encoder)
    encoder.eval()
    images = torch.randn(1, 3, 48, 80)
    torch.compiler.reset()  # else methods count as one function compiled too often
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), encoder(images))
