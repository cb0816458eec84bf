"""Speed and memory of SAM's encoder beside others: ``python -m benchmarks.speed [--size 1024] [--mode eval step] ...``.

Contenders take turns, each in a process of its own, so that a drift of the machine's speed hits all of them and peak
memory is each one's own. Random weights, ViT-B by default, batch 1, random images; a step is forward and backward with
the sum of the embeddings as loss. Run nothing else meanwhile. Medians over all rounds; ratios are to the first row.
Two processes of the same work can differ by a tenth; a difference smaller than that shows with --together, in one
process whose contenders take turns (no memory is measured then).

Contenders (mode eval): ``ours``, ``segment_anything``, ``transformers-sdpa``, ``transformers-eager``, ``timm-vit`` (a
plain ViT of the same width without relative positions). In mode step those with ``+lora`` or ``+conv_lora`` train; ours
also with ``+checkpointing``. Theirs get LoRA as it is usually written: ``W x + s B A x``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from semseg_automl.build import build_method
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.sam import SAM_ENCODERS, SAM_SIZES
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.third_party import make_torchvision_importable

CONTENDERS = {
    "eval": ["ours", "segment_anything", "transformers-sdpa", "transformers-eager"],
    "step": [
        "ours+lora",
        "ours+conv_lora",
        "ours+conv_lora+checkpointing",
        "segment_anything+lora",
        "transformers-sdpa+lora",
        "transformers-eager+lora",
    ],
}
GIB = 2**30


class PlainLora(nn.Module):
    """LoRA as it is usually written, for the others."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        out: Tensor = self.base(x) + self.up(self.down(x)) * (32 / 3)
        return out


def build_ours(encoder: str, parts: set[str]) -> nn.Module:
    """Build our encoder, adapted."""
    sam = SAM_ENCODERS[encoder]()
    sam.mark_pretrained()
    for method in parts & {"lora", "conv_lora"}:
        build_method(method, {}).apply(sam)
    sam.checkpointing = "checkpointing" in parts
    return sam


def build_segment_anything(encoder: str, side: int) -> nn.Module:
    """Build upstream's encoder; it takes only the size it is built for."""
    from semseg_automl.third_party import segment_anything

    size = SAM_SIZES[encoder]
    sam: nn.Module = segment_anything.modeling.ImageEncoderViT(
        img_size=side,
        embed_dim=size["embed_dim"],
        depth=size["depth"],
        num_heads=size["num_heads"],
        use_rel_pos=True,
        global_attn_indexes=size["global_blocks"],
        window_size=14,
    )
    return sam


def build_transformers(encoder: str, attention: str, side: int) -> nn.Module:
    """Build the encoder of ``transformers``; it takes only the size it is built for."""
    make_torchvision_importable()
    import transformers

    size = SAM_SIZES[encoder]
    options: dict[str, Any] = {"attn_implementation": attention}
    config = transformers.SamVisionConfig(
        hidden_size=size["embed_dim"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["num_heads"],
        global_attn_indexes=list(size["global_blocks"]),
        mlp_dim=4 * size["embed_dim"],
        image_size=side,
        **options,
    )
    model: nn.Module = transformers.SamVisionModel(config)
    return model


def build_timm(encoder: str, side: int) -> nn.Module:
    """Build timm's plain ViT of the same width and depth."""
    from semseg_automl.third_party import timm

    name = {"sam_vit_b": "vit_base", "sam_vit_l": "vit_large", "sam_vit_h": "vit_huge"}[encoder]
    model: nn.Module = timm.create_model(f"{name}_patch16_224", num_classes=0, img_size=side, global_pool="")
    return model


def build(who: str, encoder: str, side: int) -> nn.Module:
    """Build a contender, with LoRA if its name says so."""
    name, *rest = who.split("+")
    parts = set(rest)
    if name == "ours":
        return build_ours(encoder, parts)
    if name == "segment_anything":
        model = build_segment_anything(encoder, side)
    elif name == "timm-vit":
        model = build_timm(encoder, side)
    else:
        model = build_transformers(encoder, name.removeprefix("transformers-"), side)
    if "lora" in parts:
        model.requires_grad_(False)
        for module in list(model.modules()):
            qkv = getattr(module, "qkv", None)
            if isinstance(qkv, nn.Linear):
                module.qkv = PlainLora(qkv)
    return model


def embeddings(output: Any) -> Tensor:
    """Take the embeddings out of whatever a contender returns."""
    return output if isinstance(output, Tensor) else output.last_hidden_state


def work(who: str, mode: str, encoder: str, side: int, precision: str, device: str, repeats: int) -> dict[str, float]:
    """Time one contender in this process."""
    run = prepared(who, mode, encoder, side, precision, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [timed(run, device) for _ in range(repeats)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"seconds": statistics.median(times), "peak": peak / GIB}


def prepared(who: str, mode: str, encoder: str, side: int, precision: str, device: str) -> Callable[[], None]:
    """Build a contender and return what is timed, run once."""
    torch.manual_seed(0)
    model = build(who, encoder, side).to(device)
    images = torch.randn(1, 3, side, side, device=device)
    run = runner(model.train(mode == "step"), images, mode, torch.bfloat16 if precision == "bf16" else None)
    run()
    return run


def timed(run: Callable[[], None], device: str) -> float:
    """Return the seconds of one run."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def runner(model: nn.Module, images: Tensor, mode: str, autocast: torch.dtype | None) -> Callable[[], None]:
    """Return what is timed."""

    def run() -> None:
        with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
            if mode == "eval":
                with torch.inference_mode():
                    model(images)
                return
            loss = embeddings(model(images)).float().sum()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def synchronise(device: str) -> None:
    """Wait for an accelerator."""
    if device == "cuda":
        torch.cuda.synchronize()


def contenders(options: argparse.Namespace, mode: str) -> list[str]:
    """Return who takes part: in evaluation nobody with a fine-tuning method."""
    return [name for name in options.who or CONTENDERS[mode] if not (mode == "eval" and "+" in name)]


def compare(options: argparse.Namespace, mode: str, side: int) -> None:
    """Let the contenders take turns and print their table."""
    names = contenders(options, mode)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.speed", "--worker", name, "--mode", mode, "--size", str(side)]
            command += ["--encoder", options.encoder, "--precision", options.precision, "--device", options.device]
            done = subprocess.run([*command, "--repeats", str(options.repeats)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"\n{options.encoder} {mode} at {side}, {options.precision}, {options.device}; {options.rounds} rounds")
    print(f"{'':32} {'seconds':>8} {'spread':>15} {'ratio':>6} {'peak GiB':>9}")
    first = statistics.median(r["seconds"] for r in results[names[0]])
    for name, runs in results.items():
        seconds = sorted(r["seconds"] for r in runs)
        middle, peak = statistics.median(seconds), max(r["peak"] for r in runs)
        spread = f"{seconds[0]:.2f} to {seconds[-1]:.2f}"
        print(f"{name:32} {middle:8.2f} {spread:>15} {middle / first:6.2f} {peak:9.2f}", flush=True)


def together(options: argparse.Namespace, mode: str, side: int) -> None:
    """Let the contenders take turns in this process, and print what each takes of the first one's time."""
    names = contenders(options, mode)
    asked = options.encoder, side, options.precision, options.device
    runs = {name: prepared(name, mode, *asked) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in names if turn % 2 else names[::-1]:
            seconds[name].append(timed(runs[name], options.device))
    print(f"\n{' '.join(map(str, asked))} {mode}, {options.rounds} rounds in turns")
    print(f"{'':32} {'seconds':>8} {'ratio of a round, median and quartiles':>40}")
    for name in names:
        ratios = [own / first for own, first in zip(seconds[name], seconds[names[0]], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(f"{name:32} {statistics.median(seconds[name]):8.2f} {middle:22.3f} ({low:.3f} to {high:.3f})")


def parity(encoder: str, side: int, batch: int = 2, *, double: bool = False) -> None:
    """Print how far our embeddings and masks are from segment_anything's, on the same random weights and images.

    With `double` also in float64, and how far the float32 embeddings of both are from those: whose rounding it is.
    """
    from semseg_automl.third_party import segment_anything

    torch.manual_seed(0)
    upstream = segment_anything.sam_model_registry[encoder.removeprefix("sam_")]().eval()
    # One mask token, as our decoder has: tokens see each other.
    transformer = segment_anything.modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    upstream.mask_decoder = segment_anything.modeling.MaskDecoder(
        transformer_dim=256, transformer=transformer, num_multimask_outputs=0
    )
    for name, parameter in upstream.named_parameters():
        if "rel_pos" in name or name.endswith("pos_embed"):
            nn.init.normal_(parameter, std=0.1)  # upstream leaves zeros
    model = SegmentationModel(SAM_ENCODERS[encoder](), MaskDecoder(256, mlp_dim=2048)).eval()
    state = upstream.state_dict()
    model.encoder.load_pretrained(state, source="upstream")
    model.mask_decoder.load_sam(state, source="upstream")
    images = 255 * torch.rand(batch, 3, side, side)
    ours, theirs = compare_outputs(encoder, model, upstream, images)
    if double:
        exact = compare_outputs(encoder, model.double(), upstream.double(), images.double())[1]
        mine, other = ((each - exact).abs().max() for each in (ours, theirs))
        print(f"float32 embeddings differ from float64 ones by {mine:.1e} here and by {other:.1e} in segment_anything")


def compare_outputs(encoder: str, model: SegmentationModel, upstream: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Print how far embeddings differ, and masks in float32, upstream's only format; return both embeddings."""
    with torch.inference_mode():
        theirs = upstream.image_encoder((images - upstream.pixel_mean) / upstream.pixel_std)
        ours = model.encoder(model.normalise(images))
        what = f"{encoder} at {images.shape[-1]}, batch {len(images)}, {images.dtype}"
        print(f"{what}: embeddings of size {theirs.abs().max():.1f} {differ(ours, theirs)}", flush=True)
        if images.dtype == torch.float32:
            dense = upstream.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(theirs[:1])
            position, sparse = upstream.prompt_encoder.get_dense_pe(), torch.zeros(1, 0, 256)
            decoder = upstream.mask_decoder
            masks = torch.cat([decoder.predict_masks(each[None], position, sparse, dense)[0] for each in theirs])
            own = model.mask_decoder(ours, images).mask_logits
            print(f"mask logits of size {masks.abs().max():.1e} {differ(own, masks)}", flush=True)
    return ours, theirs


def differ(ours: Tensor, theirs: Tensor) -> str:
    """Tell the largest difference, and as `torch.testing.assert_close` sees it where both tolerances are one."""
    apart = (ours - theirs).abs()
    return f"differ by {apart.max():.1e}, beside 1 + |value| by {(apart / (1 + theirs.abs())).max():.1e}"


def main() -> None:
    """Compare, or time one contender as its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="sam_vit_b", choices=list(SAM_ENCODERS))
    parser.add_argument("--size", type=int, nargs="+", default=[1024])
    parser.add_argument("--mode", nargs="+", default=["eval", "step"], choices=["eval", "step"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="timed runs per process, after one that is not")
    parser.add_argument("--who", nargs="+", help="contenders, instead of the mode's usual ones")
    parser.add_argument("--parity", action="store_true", help="compare values with segment_anything instead of times")
    parser.add_argument("--double", action="store_true", help="with --parity: in float64, too")
    parser.add_argument("--batch", type=int, default=2, help="with --parity: images")
    parser.add_argument("--together", action="store_true", help="all in one process, for small differences")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.together and options.rounds < 2:
        parser.error("--together needs two rounds at least, for quartiles")
    if options.parity:
        parity(options.encoder, options.size[0], options.batch, double=options.double)
        return
    if options.worker:
        mode, side = options.mode[0], options.size[0]
        figures = work(
            options.worker, mode, options.encoder, side, options.precision, options.device, options.repeats
        )
        print(json.dumps(figures))
        return
    for side in options.size:
        for mode in options.mode:
            (together if options.together else compare)(options, mode, side)


if __name__ == "__main__":
    main()
