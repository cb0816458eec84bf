"""Trained adapters in the names of other programs: AutoGluon MultiModal, and Hugging Face PEFT.

AutoGluon (the reference implementation of Conv-LoRA, Zhong et al., ICLR 2024) adapts SAM as ``transformers`` has it: a
linear layer with further tensors takes the place of each ``attn.qkv``, and the mask decoder trains along. PEFT's format
is a folder with LoRA's tensors, DoRA's too, and a file of options; Conv-LoRA and a decoder have no place in it.

Only names, checks and files are here. The layers themselves are in `lora` and `conv_lora`.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from semseg_automl.errors import CheckpointError, UnsupportedCombination
from semseg_automl.models.checkpoints import read_checkpoint
from semseg_automl.models.encoder import Encoder
from semseg_automl.models.sam import SamViT
from semseg_automl.models.sam_names import to_sam_names
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.peft.base import trainable_parameters
from semseg_automl.peft.conv_lora import ConvLoraLinear
from semseg_automl.peft.lora import LoraLinear, scale_of

AUTOGLUON_ALPHA = 32.0  # unless its user changed it; its files do not say
CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20

_Parts = dict[str, Tensor]  # the tensors of one adapted layer, by our names of its parameters
_CONV_PARTS = ("w_gate", "w_noise", "expert_weight", "expert_bias")
_ADAPTER = re.compile(rf"encoder\.blocks\.(\d{{1,4}})\.attn\.qkv\.(lora_A|lora_B|magnitude|{'|'.join(_CONV_PARTS)})")

# AutoGluon's name of a layer's parameter -> ours. Its experts are one module per scale, stacked in ours.
_AUTOGLUON_PARTS = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_moe_gating.w_gate": "w_gate",
    "lora_moe_gating.w_noise": "w_noise",
}
_AUTOGLUON_CLASSES = "mask_decoder.output_classifier_mlps."
_SAM_QKV = re.compile(  # the gate's mean and std are constants, 0 and 1
    r"image_encoder\.blocks\.(\d{1,4})\.attn\.qkv\."
    r"(weight|bias|lora_[AB]|lora_moe_gating\.(?:w_gate|w_noise|mean|std)|lora_moe_experts\.\d{1,4}\.0\.(?:weight|bias))"
)
_SAM_FROZEN = {
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "mask_decoder.positional_encoding_gaussian_matrix",
    "prompt_encoder.no_mask_embed.weight": "mask_decoder.no_mask_embed",
}
# What a model without prompts and without a guess of its own quality does not compute.
_NOT_OURS = ("prompt_encoder.", "mask_decoder.iou_prediction_head.")
# Our names inside the mask decoder -> those of transformers: the way back of `to_sam_names`, applied in order.
_DECODER_NAMES = (
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"(_mlps\.\d+)\.layers\.0\.", r"\1.proj_in."),
    (r"(_mlps\.\d+)\.layers\.1\.", r"\1.layers.0."),
    (r"(_mlps\.\d+)\.layers\.2\.", r"\1.proj_out."),
    (r"^mask_decoder\.class_head\.", _AUTOGLUON_CLASSES),
)

_HF_PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_HF_NAME = re.compile(r"base_model\.model\.(vision_encoder\.layers|blocks)\.(\d{1,4})\.attn\.qkv\.(.+)")
# PEFT's options on which no output depends once the tensors are there.
_HF_HARMLESS = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "task_type"),
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "megatron_core"),
    *("qalora_group_size", "eva_config"),
)
_HF_DEFAULTS = {"use_rslora": False, "use_dora": False, "bias": "none", "init_lora_weights": True}


def to_autogluon(model: SegmentationModel, prefix: str = "model.model.") -> dict[str, Tensor]:
    """Return copies of what trained in a SAM, adapters and mask decoder, in AutoGluon's names.

    Alpha is not among them: AutoGluon has to be told it where it is not 32, which a warning says.

    Args:
        model: a SAM with ``optim.peft`` lora or conv_lora.
        prefix: what AutoGluon's names start with; ``model.model.`` in a Lightning file.

    Raises:
        UnsupportedCombination: the encoder is no SAM, its layers compute otherwise than AutoGluon's, or tensors trained
            that it does not have.
    """
    if not isinstance(model.encoder, SamViT):
        raise UnsupportedCombination(
            f"the encoder is {type(model.encoder).__name__}; AutoGluon adapts SAM alone. Use model.encoder sam_vit_b, "
            "sam_vit_l or sam_vit_h, or write LoRA in PEFT's format (write_hf_adapter)."
        )
    _check_computes_as_autogluon(next(iter(_adapted_layers(model).values())))
    theirs = {ours: part for part, ours in _AUTOGLUON_PARTS.items()}
    written: dict[str, Tensor] = {}
    for name, parameter in trainable_parameters(model).items():
        tensor = parameter.detach().cpu().clone()
        adapter = _ADAPTER.fullmatch(name)
        if adapter is not None:
            place, part = f"vision_encoder.layers.{adapter[1]}.attn.qkv.", adapter[2]
            if part in theirs:
                written[place + theirs[part]] = tensor
            else:
                kind = part.removeprefix("expert_")
                written |= {f"{place}lora_moe_experts.{e}.0.{kind}": one.clone() for e, one in enumerate(tensor)}
        elif name.startswith("mask_decoder.") and ".lora_" not in name and not name.startswith("mask_decoder.detail."):
            for pattern, replacement in _DECODER_NAMES:
                name = re.sub(pattern, replacement, name)
            written[name] = tensor
        else:
            raise UnsupportedCombination(
                f"'{name}' trained; AutoGluon has adapters on attn.qkv and SAM's own mask decoder. Fit with pretrained "
                "weights, model.detail=False and optim.lora.decoder_rank=0."
            )
    return {prefix + name: tensor for name, tensor in written.items()}


def from_autogluon(state: Mapping[str, Tensor], *, source: str = "the checkpoint") -> dict[str, Tensor]:
    """Give a SAM that AutoGluon trained the names of a `SegmentationModel` with a `SamViT`.

    Left out is what our model does not have: the prompt encoder, the decoder's guess of its own quality, constants of
    the gates, and whatever stands beside the network in a Lightning file, such as weights of a loss.

    Args:
        state: tensors by AutoGluon's names, under any prefix; the whole model, or what trained.
        source: what to call the file in errors.

    Returns:
        The same tensors, but for the experts, which are stacked.

    Raises:
        CheckpointError: names or experts are not those of a SAM adapted on ``attn.qkv``.
    """
    named = _sam_names(state, source)
    ours: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    adapted = {name.removesuffix("lora_A") for name in named if name.endswith(".attn.qkv.lora_A")}
    for name, tensor in named.items():
        layer = _SAM_QKV.fullmatch(name)
        if layer is None and ".lora_" in name:
            raise _not_of_qkv(name, source)
        if layer is not None:
            place, part = f"encoder.blocks.{layer[1]}.attn.qkv.", layer[2]
            if part.startswith("lora_moe_experts."):
                _, expert, _, kind = part.split(".")
                experts.setdefault(f"{place}expert_{kind}", {})[int(expert)] = tensor
            elif part in _AUTOGLUON_PARTS:
                ours[place + _AUTOGLUON_PARTS[part]] = tensor
            elif part in ("weight", "bias"):
                ours[f"{place}{'base.' if name.removesuffix(part) in adapted else ''}{part}"] = tensor
        elif name in _SAM_FROZEN:
            ours[_SAM_FROZEN[name]] = tensor.flatten() if name.endswith("no_mask_embed.weight") else tensor
        elif not name.startswith(_NOT_OURS):
            ours[re.sub(r"^image_encoder\.", "encoder.", name)] = tensor
    return ours | {name: _stacked(name, found, source) for name, found in experts.items()}


def _sam_names(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Drop AutoGluon's prefix and name its tensors as segment_anything does; the class head already as ours."""
    prefixes = {name.partition("vision_encoder.")[0] for name in state if "vision_encoder." in name}
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{source} is no SAM of AutoGluon's: its names are {list(state)[:3]}, ..., with 'vision_encoder.' under "
            f"the prefixes {sorted(prefixes)}, not one. Give the model.ckpt of AutoGluon, or a folder that PEFT wrote."
        )
    prefix = prefixes.pop()
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    classes = {name: inner.pop(name) for name in list(inner) if name.startswith(_AUTOGLUON_CLASSES)}
    head = {name.replace(_AUTOGLUON_CLASSES, "mask_decoder.class_head."): tensor for name, tensor in classes.items()}
    return to_sam_names(inner, source=source) | head


def _stacked(name: str, experts: dict[int, Tensor], source: str) -> Tensor:
    """Stack the tensors of experts 0, 1, ..., which must all be there and of one shape."""
    shapes = {tuple(tensor.shape) for tensor in experts.values()}
    if sorted(experts) != list(range(len(experts))) or len(shapes) != 1:
        raise CheckpointError(
            f"{source}: '{name}' has experts {sorted(experts)} of shapes {sorted(shapes)}, needed are 0, 1, ... of one "
            "shape. It is damaged; write it again."
        )
    return torch.stack([experts[e] for e in range(len(experts))])


def write_hf_adapter(folder: str | Path, model: SegmentationModel) -> None:
    """Write a model's LoRA layers as a folder that PEFT loads onto the same encoder in ``transformers`` or timm.

    The encoder's adapters are all that it holds: neck and mask decoder are ours, and the format has no place for them.

    Args:
        folder: made if need be; files of an older adapter in it are replaced.
        model: with ``optim.peft`` lora.

    Raises:
        UnsupportedCombination: the model has no LoRA layers, or has Conv-LoRA's.
        CheckpointError: the folder cannot be written.
    """
    layers = _adapted_layers(model)
    first = next(iter(layers.values()))
    if isinstance(first, ConvLoraLinear):
        raise UnsupportedCombination(
            "optim.peft is conv_lora, and PEFT's format cannot hold its experts. AutoGluon's can: use to_autogluon."
        )
    places = {f"{_hf_root(model.encoder)}.{index}.attn.qkv": layer for index, layer in layers.items()}
    tensors = {
        f"base_model.model.{place}.{_HF_PARTS[name]}": parameter.detach().cpu().contiguous()
        for place, layer in places.items()
        for name, parameter in layer.named_parameters(recurse=False)
    }
    config = {
        **{"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True},
        **{"r": first.rank, "lora_alpha": first.alpha, "lora_dropout": 0.0, "bias": "none"},
        **{"use_rslora": first.scaling_rule == "sqrt_rank", "use_dora": first.magnitude is not None},
        # Whole names where only some blocks are adapted: PEFT would put fresh adapters on the others.
        "target_modules": ["qkv"] if len(layers) == len(model.encoder.blocks) else list(places),
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write '{folder}' ({error}). Check space and permissions.") from error


def read_hf_adapter(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a LoRA adapter from a folder as PEFT writes it.

    Returns:
        Tensors named ``encoder.blocks.0.attn.qkv.lora_A``, also for an encoder of timm, whose layers lie deeper in our
        model (`load_adapter` finds them); and the options ``rank, alpha, scaling, dora``, as in ``optim.lora``.

    Raises:
        CheckpointError: a file is missing, damaged or too large, or holds what is not LoRA on ``attn.qkv``.
    """
    return _read_hf(Path(folder))[:2]


def _read_hf(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], set[str]]:
    """Read a folder; also return where its layers are in the model it is of, see `_hf_root`."""
    for file in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / file).is_file():
            raise CheckpointError(f"no '{file}' in '{folder}'. Give the folder that PEFT's save_pretrained wrote.")
    options = _hf_options(folder / CONFIG_FILE)
    ours = {theirs: name for name, theirs in _HF_PARTS.items()}
    tensors: dict[str, Tensor] = {}
    roots: set[str] = set()
    for name, tensor in read_checkpoint(folder / TENSORS_FILE).items():
        found = _HF_NAME.fullmatch(name)
        if found is None or found[3] not in ours:
            raise _not_of_qkv(name, f"'{folder}'")
        roots.add(found[1])
        tensors[f"encoder.blocks.{found[2]}.attn.qkv.{ours[found[3]]}"] = tensor
    ranks = {tensor.shape[:1] for name, tensor in tensors.items() if name.endswith("lora_A")}
    if ranks - {(options["rank"],)} or options["dora"] != any(name.endswith("magnitude") for name in tensors):
        raise CheckpointError(f"'{folder}' is damaged: its r or use_dora is not that of its tensors. Write it again.")
    return tensors, options, roots


def _hf_options(path: Path) -> dict[str, Any]:
    """Read PEFT's file of options, check them, and return those that say how the tensors are used."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"'{path}' is larger than {MAX_CONFIG_BYTES} bytes; PEFT writes about a thousand.")
    try:
        config = {**_HF_DEFAULTS, **json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is no JSON object of options ({error}). Write it again.") from error
    rank, alpha = config.get("r"), config.get("lora_alpha")
    starts = (True, False, "gaussian", "orthogonal", "eva")  # most others, such as PiSSA, change the base weights
    checks = {
        "peft_type": (config.get("peft_type") == "LORA", "LORA"),
        "r": (type(rank) is int and 0 < rank < 2**31, "1, 2, ..."),
        "lora_alpha": (isinstance(alpha, int | float) and abs(alpha) < 2**31, "a number"),
        **{name: (type(config[name]) is bool, "true, false") for name in ("use_rslora", "use_dora")},
        "bias": (config["bias"] == "none", "none"),
        "init_lora_weights": (config["init_lora_weights"] in starts, ", ".join(map(str, starts))),
    }
    # Every other option that is set changes what the adapter computes, or may.
    others = config.keys() - checks.keys() - set(_HF_HARMLESS)
    checks |= {name: (not config[name], "null, false") for name in sorted(others)}
    for name, (fits, allowed) in checks.items():
        if not fits:
            raise CheckpointError(
                f"'{path}': '{name}' is {str(config.get(name))[:80]}; allowed: {allowed}. Train it as LoRA or DoRA on "
                "the encoder's own weights, with PEFT's other options left alone, or convert it."
            )
    scaling = "sqrt_rank" if config["use_rslora"] else "rank"
    return {"rank": rank, "alpha": alpha, "scaling": scaling, "dora": config["use_dora"]}


def load_adapter(model: SegmentationModel, path: str | Path) -> None:
    """Copy a trained adapter into a model whose fine-tuning method is applied; all of it, or nothing where it fails.

    What else an AutoGluon file holds is copied as well: the mask decoder, and the encoder's base weights. What a file
    does not hold stays: with PEFT's folders the decoder, and the neck of a plain ViT, which have to be trained on.

    Args:
        model: with ``optim.peft`` lora or conv_lora, built as the adapter's was.
        path: a folder that PEFT or `write_hf_adapter` wrote, or a file in AutoGluon's names: ``.safetensors``, or a
            torch file (``.ckpt``, ``.pt``, ``.pth``).

    Raises:
        CheckpointError: there is no adapter, it cannot be read, or it is of another method, size or scaling; both sides
            and the setting to change are named.
        UnsupportedCombination: the model has no layers for it, or they compute otherwise than AutoGluon's.
    """
    path, source = Path(path), f"'{path}'"
    layers = _adapted_layers(model)
    first = next(iter(layers.values()))
    options: dict[str, Any] | None = None
    if path.is_dir():
        tensors, options, roots = _read_hf(path)
    elif path.is_file():
        tensors, roots = from_autogluon(read_checkpoint(path), source=source), {"vision_encoder.layers"}
        _check_computes_as_autogluon(first)
    else:
        raise CheckpointError(f"no adapter at {source}. Give an existing file, or a folder that PEFT wrote.")
    expected = _hf_root(model.encoder)
    if roots - {expected}:
        raise CheckpointError(
            f"{source} adapts {', '.join(sorted(roots))}, the model {expected} (SAM has vision_encoder.layers, others "
            "blocks). Set model.encoder to what it was fitted on."
        )
    adapters: dict[int, _Parts] = {}
    for name in [name for name in tensors if _ADAPTER.fullmatch(name)]:
        _, _, block, _, _, part = name.split(".")
        adapters.setdefault(int(block), {})[part] = tensors.pop(name)
    _check_adapters(layers, adapters, len(model.encoder.blocks), source)
    if options is not None:
        _check_scaling(first, options, source)
    _check_rest(model, tensors, source)
    for index, layer in layers.items():
        layer.load_state_dict(adapters[index], strict=False)  # the base layer inside is not among them
    model.load_state_dict(tensors, strict=False)


def _adapted_layers(model: SegmentationModel) -> dict[int, LoraLinear]:
    """Return the adapted ``attn.qkv`` by index of their block; raise `UnsupportedCombination` if there are none."""
    qkv = {index: seams["qkv"].module for index, seams in enumerate(model.encoder.seams()) if "qkv" in seams}
    layers = {index: module for index, module in qkv.items() if isinstance(module, LoraLinear)}
    if not layers:
        raise UnsupportedCombination("the model has no adapted attn.qkv. Use optim.peft lora or conv_lora, not merged.")
    return layers


def _hf_root(encoder: Encoder) -> str:
    """Return where the blocks are in the model that PEFT sees: transformers' for SAM, else timm's."""
    return "vision_encoder.layers" if isinstance(encoder, SamViT) else "blocks"


def _not_of_qkv(name: str, source: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: '{name}' is no tensor of LoRA or Conv-LoRA on a block's attn.qkv, and only those are taken over. "
        "Give an adapter with the target qkv alone, of SAM in transformers or of a plain ViT in timm."
    )


def _check_computes_as_autogluon(layer: LoraLinear) -> None:
    """Raise `UnsupportedCombination` unless a layer computes as AutoGluon's; warn of an alpha that is not its own."""
    theirs = {"scaling": "rank", "dora": False, "activation": "gelu", "interpolation": "bicubic", "windowed": True}
    ours: dict[str, object] = {"scaling": layer.scaling_rule, "dora": layer.magnitude is not None}
    if isinstance(layer, ConvLoraLinear):
        ours |= {name: getattr(layer, name) for name in ("activation", "interpolation", "windowed")}
    for name, value in ours.items():
        if value != theirs[name]:
            raise UnsupportedCombination(
                f"optim.lora.{name} is {value}, {theirs[name]} with AutoGluon always. Set it to that, or use PEFT's "
                "format for LoRA."
            )
    if layer.alpha != AUTOGLUON_ALPHA:
        warnings.warn(
            f"AutoGluon's files do not hold alpha: AutoGluon's is {AUTOGLUON_ALPHA:g} by default, this model's "
            f"{layer.alpha:g}. The adapter computes the same only with the same optim.lora.alpha on both sides.",
            stacklevel=3,
        )


def _check_adapters(layers: dict[int, LoraLinear], adapters: dict[int, _Parts], depth: int, source: str) -> None:
    """Raise `CheckpointError` unless the adapters are of the model's method, blocks and sizes."""
    if not adapters:
        raise CheckpointError(f"{source} holds no adapter on attn.qkv. Give the file of a LoRA or Conv-LoRA model.")
    theirs = "conv_lora" if any(part in _CONV_PARTS for found in adapters.values() for part in found) else "lora"
    ours = "conv_lora" if isinstance(next(iter(layers.values())), ConvLoraLinear) else "lora"
    if theirs != ours:
        raise CheckpointError(f"{source} holds {theirs}, the model has {ours}. Set optim.peft={theirs}.")
    if adapters.keys() != layers.keys():
        are_last = adapters.keys() == set(range(depth - len(adapters), depth))
        setting = f"optim.lora.last_blocks={len(adapters)}" if are_last else "model.encoder to what it was fitted on"
        raise CheckpointError(
            f"{source} adapts the blocks {sorted(adapters)}; of the model's {depth}, {sorted(layers)} are adapted, by "
            f"optim.lora.last_blocks. Set {setting}."
        )
    for index, layer in layers.items():
        _check_layer(layer, adapters[index], f"{source}, block {index}")


def _check_layer(layer: LoraLinear, found: _Parts, source: str) -> None:
    """Raise `CheckpointError` unless the tensors found are those of an adapted layer, all of them and of its sizes."""
    expected = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters(recurse=False)}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    for name, axis, size, remedy in (
        ("lora_A", 1, "width", "model.encoder to what it was fitted on"),
        ("lora_A", 0, "rank", "optim.lora.rank={}"),
        ("expert_weight", 0, "experts", "optim.lora.experts={}"),
    ):
        theirs, ours = (side[name][axis] if axis < len(side.get(name, ())) else None for side in (shapes, expected))
        if theirs is not None and theirs != ours:
            raise CheckpointError(f"{source} has {size} {theirs}, the model {ours}. Set {remedy.format(theirs)}.")
    for name in expected | shapes:
        if shapes.get(name) != expected.get(name):
            remedy = f"Set optim.lora.dora={name in shapes}" if name == "magnitude" else "It is damaged; write it again"
            raise CheckpointError(
                f"{source}: '{name}' has the shape {shapes.get(name)}, in the model {expected.get(name)}. {remedy}."
            )


def _check_scaling(layer: LoraLinear, options: dict[str, Any], source: str) -> None:
    alpha, rule = options["alpha"], options["scaling"]
    scaling = scale_of(alpha, options["rank"], rule)
    if not math.isclose(scaling, layer.scaling, rel_tol=1e-6):
        raise CheckpointError(
            f"{source} scales its correction by {scaling:g} (alpha {alpha:g}, rule {rule}), the model by "
            f"{layer.scaling:g}. Set optim.lora.alpha={alpha:g} and optim.lora.scaling={rule}."
        )


def _check_rest(model: SegmentationModel, rest: dict[str, Tensor], source: str) -> None:
    """Raise `CheckpointError` unless all other tensors have their place, and a decoder comes whole or not at all."""
    own = model.state_dict()
    decoder = [f"mask_decoder.{name}" for name, _ in model.mask_decoder.named_parameters()]
    wrong = [name for name, tensor in rest.items() if name not in own or own[name].shape != tensor.shape]
    if any(name in rest for name in decoder):
        wrong += [name for name in decoder if name not in rest]
    if wrong:
        name = min(wrong, key=lambda name: ("mask_tokens" not in name, "class_head" not in name))
        theirs, ours = (tuple(side[name].shape) if name in side else "missing" for side in (rest, own))
        raise CheckpointError(
            f"{source}: '{name}' is {theirs}, in the model {ours} ({len(wrong)} tensors differ). Build it for the same "
            "task, with as many mask tokens (model.multiclass_head=queries, model.num_queries; one for a binary task), "
            "and without model.detail and optim.lora.decoder_rank, which AutoGluon does not have."
        )
