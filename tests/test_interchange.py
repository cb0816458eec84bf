"""Adapters to and from AutoGluon and Hugging Face PEFT: names, round trips, same outputs, and every refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from semseg_automl.build import build_method
from semseg_automl.errors import CheckpointError, UnsupportedCombination
from semseg_automl.models.encoder import Encoder
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.sam import SamViT
from semseg_automl.models.sam_names import to_sam_names
from semseg_automl.models.segmentation_model import SegmentationModel, semantic_scores
from semseg_automl.models.timm_encoder import build_timm_encoder
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft import trainable_parameters
from semseg_automl.peft.interchange import from_autogluon, load_adapter, read_hf_adapter, to_autogluon, write_hf_adapter

Options = dict[str, Any]
CONV: Options = {"experts": 2}
BINARY: Options = {"num_mask_tokens": 1}
QUERIES: Options = {"num_mask_tokens": 4, "num_classes": 3}
MORE: Options = {"num_mask_tokens": 4, "num_classes": 5}

# What peft 0.21.2 wrote for LoraConfig(r=3, lora_alpha=32, target_modules=["qkv"], use_dora=True) on a small model.
STORED_CONFIG = """{"alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null,
"auto_mapping": {"base_model_class": "M", "parent_library": "__main__"}, "base_model_name_or_path": null,
"bias": "none", "corda_config": null, "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null,
"fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "kasa_config": null,
"layer_replication": null, "layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 32,
"lora_bias": false, "lora_dropout": 0.0, "lora_ga_config": null, "megatron_config": null,
"megatron_core": "megatron.core", "modules_to_save": null, "monteclora_config": null, "peft_type": "LORA",
"peft_version": "0.21.2", "qalora_group_size": 16, "r": 3, "rank_pattern": {}, "revision": null,
"target_modules": ["qkv"], "target_parameters": null, "task_type": null, "trainable_token_indices": null,
"use_bdlora": null, "use_dora": true, "use_qalora": false, "use_rslora": false, "velora_config": null}"""
WRITTEN_CONFIG = """{"peft_type": "LORA", "task_type": null, "base_model_name_or_path": null, "inference_mode": true,
"r": 3, "lora_alpha": 32.0, "lora_dropout": 0.0, "bias": "none", "use_rslora": false, "use_dora": false,
"target_modules": ["qkv"]}"""
STORED_NAMES = [
    "base_model.model.blocks.0.attn.qkv.lora_A.weight",
    "base_model.model.blocks.0.attn.qkv.lora_B.weight",
    "base_model.model.blocks.0.attn.qkv.lora_magnitude_vector",
    "base_model.model.blocks.1.attn.qkv.lora_A.weight",
    "base_model.model.blocks.1.attn.qkv.lora_B.weight",
    "base_model.model.blocks.1.attn.qkv.lora_magnitude_vector",
]

AUTOGLUON_LAYER = {
    "model.model.vision_encoder.layers.0.attn.qkv.lora_A": (3, 32),
    "model.model.vision_encoder.layers.0.attn.qkv.lora_B": (96, 3),
    "model.model.vision_encoder.layers.0.attn.qkv.lora_moe_gating.w_gate": (3, 2),
    "model.model.vision_encoder.layers.0.attn.qkv.lora_moe_gating.w_noise": (3, 2),
    "model.model.vision_encoder.layers.0.attn.qkv.lora_moe_experts.0.0.weight": (3, 3, 3, 3),
    "model.model.vision_encoder.layers.0.attn.qkv.lora_moe_experts.0.0.bias": (3,),
    "model.model.vision_encoder.layers.0.attn.qkv.lora_moe_experts.1.0.weight": (3, 3, 3, 3),
    "model.model.vision_encoder.layers.0.attn.qkv.lora_moe_experts.1.0.bias": (3,),
}


def sam(depth: int = 2, width: int = 32) -> Encoder:
    return SamViT(embed_dim=width, depth=depth, num_heads=2, global_blocks=(1,), window_size=3, grid=4, out_channels=32)


def tiny() -> Encoder:
    return TinyViT(embed_dim=32, depth=2, num_heads=2, out_channels=32, grid=4)


def timm() -> Encoder:
    return build_timm_encoder("deit_tiny_patch16_224", out_channels=32, embed_dim=32, depth=2, num_heads=2, img_size=64)


def adapted(
    method: str = "lora", build: Callable[[], Encoder] = sam, decoder: Options = BINARY, seed: int = 1, **options: Any
) -> SegmentationModel:
    """Build a model with the same base weights and neck every time; all else that trains is drawn from `seed`."""
    torch.manual_seed(0)
    encoder = build()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    encoder.mark_pretrained()
    mask_decoder = MaskDecoder(32, mlp_dim=64, **decoder)
    peft = build_method(method, options)
    peft.apply(encoder)
    peft.apply_to_decoder(mask_decoder, pretrained=True)
    model = SegmentationModel(encoder, mask_decoder)
    torch.manual_seed(seed)
    for name, parameter in trainable_parameters(model).items():
        if not name.startswith("encoder.neck."):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def embeddings(model: SegmentationModel) -> Tensor:
    torch.manual_seed(5)
    encoded: Tensor = model.encoder(torch.randn(2, 3, 64, 64))
    return encoded


def autogluon_file(folder: Path, model: SegmentationModel, without: str = "^$", further: str = "") -> Path:
    """Write what trained in AutoGluon's names, without those a pattern is found in, and with a further one."""
    state = {name: tensor for name, tensor in to_autogluon(model).items() if not re.search(without, name)}
    save_file(state | ({further: torch.zeros(3, 32)} if further else {}), folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A SamModel of transformers of our small sizes; every tensor drawn."""
    from transformers import SamConfig, SamModel

    vision: Options = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 16}
    prompt = {"hidden_size": 32, "image_size": 64, "image_embedding_size": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 64}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    model: Any = SamModel(config)
    torch.manual_seed(0)  # fixtures of a module come before the one that seeds every test
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def autogluon_state(theirs: Any) -> dict[str, Tensor]:
    """The state of AutoGluon's Lightning module: that SamModel with Conv-LoRA and a decoder of four queries."""
    spare = re.compile(r"mask_decoder\.(output_hypernetworks_mlps\.[1-9]|mask_tokens)\..+")
    inner = {name: tensor.clone() for name, tensor in theirs.state_dict().items() if not spare.fullmatch(name)}
    inner |= {f"mask_decoder.{name}.weight": torch.randn(4, 32) for name in ("mask_tokens", "output_classifier_mlps")}
    inner["mask_decoder.output_classifier_mlps.bias"] = torch.randn(4)
    for block in (0, 1):
        place = f"vision_encoder.layers.{block}.attn.qkv."
        inner |= {f"{place}lora_A": torch.randn(3, 32), f"{place}lora_B": 0.1 * torch.randn(96, 3)}
        inner |= {f"{place}lora_moe_gating.{part}": torch.randn(3, 2) for part in ("w_gate", "w_noise")}
        inner |= {f"{place}lora_moe_gating.mean": torch.zeros(1), f"{place}lora_moe_gating.std": torch.ones(1)}
        for expert in (0, 1):
            inner[f"{place}lora_moe_experts.{expert}.0.weight"] = torch.randn(3, 3, 3, 3)
            inner[f"{place}lora_moe_experts.{expert}.0.bias"] = torch.randn(3)
    return {f"model.model.{name}": tensor for name, tensor in inner.items()} | {"loss_func.empty_weight": torch.ones(4)}


def test_to_autogluon__conv_lora_with_queries__has_the_names_of_autogluon(theirs: Any) -> None:
    written = to_autogluon(adapted("conv_lora", decoder=QUERIES, **CONV))
    absent = re.compile(r"mask_decoder\.(output_hypernetworks_mlps\.[1-9]|iou_prediction_head)\..+")
    decoder = [name for name in theirs.state_dict() if name.startswith("mask_decoder.") and not absent.fullmatch(name)]
    classes = [f"mask_decoder.output_classifier_mlps.{part}" for part in ("weight", "bias")]
    layers = [name.replace("layers.0", f"layers.{block}") for name in AUTOGLUON_LAYER for block in (0, 1)]
    assert sorted(written) == sorted(layers + [f"model.model.{name}" for name in decoder + classes])
    assert {name: tuple(written[name].shape) for name in AUTOGLUON_LAYER} == AUTOGLUON_LAYER


@pytest.mark.parametrize("prefix", ["model.model.", "model.", ""])
@pytest.mark.parametrize("decoder", [BINARY, QUERIES])
@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"rank": 2}), ("conv_lora", CONV), ("lora", {"last_blocks": 1})]
)
def test_autogluon__there_and_back__is_what_trained(
    tmp_path: Path, method: str, options: Options, decoder: Options, prefix: str
) -> None:
    model, other = (adapted(method, decoder=decoder, seed=seed, **options) for seed in (1, 2))
    written, trained = to_autogluon(model, prefix), trainable_parameters(model)
    back = from_autogluon(written)
    assert back.keys() == trained.keys()
    assert all(torch.equal(back[name], parameter) for name, parameter in trained.items())
    save_file(written, tmp_path / "adapter.safetensors")
    load_adapter(other, tmp_path / "adapter.safetensors")
    assert all(torch.equal(found, trained[name]) for name, found in trainable_parameters(other).items())


@torch.no_grad()
def test_load_adapter__file_of_autogluon__equals_parameters_set_by_hand(
    autogluon_state: dict[str, Tensor], tmp_path: Path, theirs: Any
) -> None:
    torch.save({"state_dict": autogluon_state, "epoch": 3}, tmp_path / "model.ckpt")
    loaded = adapted("conv_lora", decoder=QUERIES, **CONV)
    load_adapter(loaded, tmp_path / "model.ckpt")

    encoder, decoder = sam(), MaskDecoder(32, mlp_dim=64, **QUERIES)
    original = to_sam_names(theirs.state_dict())
    encoder.load_pretrained(original, source="theirs")
    decoder.load_sam(original, source="theirs")
    build_method("conv_lora", CONV).apply(encoder)
    assert decoder.class_head is not None
    head = "model.model.mask_decoder.output_classifier_mlps."
    decoder.mask_tokens.weight.copy_(autogluon_state["model.model.mask_decoder.mask_tokens.weight"])
    decoder.class_head.weight.copy_(autogluon_state[f"{head}weight"])
    decoder.class_head.bias.copy_(autogluon_state[f"{head}bias"])
    for index, seams in enumerate(encoder.seams()):
        layer, place = seams["qkv"].module, f"model.model.vision_encoder.layers.{index}.attn.qkv."
        for name in ("lora_A", "lora_B"):
            getattr(layer, name).copy_(autogluon_state[place + name])
        for name in ("w_gate", "w_noise"):
            getattr(layer, name).copy_(autogluon_state[f"{place}lora_moe_gating.{name}"])
        for expert in (0, 1):
            layer.expert_weight[expert].copy_(autogluon_state[f"{place}lora_moe_experts.{expert}.0.weight"])
            layer.expert_bias[expert].copy_(autogluon_state[f"{place}lora_moe_experts.{expert}.0.bias"])
    by_hand = SegmentationModel(encoder, decoder).eval()

    images = 255 * torch.rand(2, 3, 64, 64)
    found, expected = loaded(images), by_hand(images)
    assert found.mask_logits.std() > 1e-3
    assert torch.equal(found.mask_logits, expected.mask_logits)
    assert torch.equal(semantic_scores(found, (64, 64)), semantic_scores(expected, (64, 64)))


def test_from_autogluon__only_some_blocks_adapted__names_the_others_base_weights_plainly(
    autogluon_state: dict[str, Tensor],
) -> None:
    for name in [name for name in autogluon_state if ".layers.0.attn.qkv.lora_" in name]:
        del autogluon_state[name]
    model = adapted("conv_lora", decoder=QUERIES, last_blocks=1, **CONV)
    assert from_autogluon(autogluon_state).keys() == model.state_dict().keys()


def test_autogluon__other_alpha__is_warned_about(tmp_path: Path) -> None:
    model = adapted(alpha=16.0)
    with pytest.warns(UserWarning, match=r"AutoGluon's is 32 .* this model's 16.*optim\.lora\.alpha"):
        state = to_autogluon(model)
    save_file(state, tmp_path / "adapter.safetensors")
    with pytest.warns(UserWarning, match="alpha"):
        load_adapter(model, tmp_path / "adapter.safetensors")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: adapted("conv_lora", tiny), "TinyViT; AutoGluon adapts SAM alone.*write_hf_adapter"),
        (lambda: adapted("decoder_only"), "no adapted attn.qkv.*conv_lora"),
        (lambda: adapted(scaling="sqrt_rank"), "optim.lora.scaling is sqrt_rank, rank with AutoGluon"),
        (lambda: adapted(dora=True), "optim.lora.dora is True"),
        (lambda: adapted("conv_lora", activation="none"), "optim.lora.activation is none, gelu with"),
        (lambda: adapted("conv_lora", interpolation="bilinear"), "optim.lora.interpolation is bilinear"),
        (lambda: adapted("conv_lora", windowed=False), "optim.lora.windowed is False"),
        (lambda: adapted(decoder={"detail": True}), "mask_decoder.detail.*model.detail=False"),
        (lambda: adapted(decoder_rank=2), "mask_decoder.*lora_A' trained.*optim.lora.decoder_rank=0"),
    ],
)
def test_to_autogluon__model_it_does_not_have__is_refused(model: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedCombination, match=message):
        to_autogluon(model())


def test_to_autogluon__encoder_without_pretrained_weights__is_refused() -> None:
    encoder = sam()
    build_method("lora", {}).apply(encoder)
    with pytest.raises(UnsupportedCombination, match=r"'encoder\.pos_embed' trained.*pretrained"):
        to_autogluon(SegmentationModel(encoder, MaskDecoder(32)))


@pytest.mark.parametrize(
    ("build", "root"), [(sam, "vision_encoder.layers"), (tiny, "blocks"), (timm, "blocks")], ids=["sam", "tiny", "timm"]
)
@pytest.mark.parametrize("options", [{}, {"scaling": "sqrt_rank", "alpha": 8.0}, {"dora": True}, {"last_blocks": 1}])
def test_hf_adapter__written_and_loaded__gives_the_same_encoder(
    tmp_path: Path, build: Callable[[], Encoder], root: str, options: Options
) -> None:
    source, target = adapted("lora", build, **options), adapted("lora", build, seed=2, **options)
    decoder = {name: tensor.clone() for name, tensor in target.mask_decoder.state_dict().items()}
    folder = tmp_path / "new" / "adapter"
    write_hf_adapter(folder, source)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    last = "last_blocks" in options
    changed = {"lora_alpha": options.get("alpha", 32.0), "use_rslora": "scaling" in options}
    changed |= {"use_dora": "dora" in options, "target_modules": [f"{root}.1.attn.qkv"] if last else ["qkv"]}
    assert config == json.loads(WRITTEN_CONFIG) | changed
    names = [name.replace("blocks", root, 1) for name in STORED_NAMES]
    names = [name for name in names if "dora" in options or "magnitude" not in name]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sorted(tensors) == [name for name in names if not last or f"{root}.1." in name]

    load_adapter(target, folder)
    assert torch.equal(embeddings(target), embeddings(source))
    assert not torch.equal(embeddings(target), embeddings(adapted("lora", build, seed=2, **options)))
    assert all(torch.equal(tensor, target.mask_decoder.state_dict()[name]) for name, tensor in decoder.items())


def test_read_hf_adapter__what_peft_wrote__is_read(tmp_path: Path) -> None:
    shapes = {"lora_A.weight": (3, 32), "lora_B.weight": (96, 3), "lora_magnitude_vector": (96,)}
    stored = {name: torch.rand(shapes[name.partition(".qkv.")[2]]) for name in STORED_NAMES}
    save_file(stored, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(STORED_CONFIG, encoding="utf-8")
    tensors, options = read_hf_adapter(tmp_path)
    assert options == {"rank": 3, "alpha": 32, "scaling": "rank", "dora": True}
    parts = ("lora_A", "lora_B", "magnitude")
    assert sorted(tensors) == [f"encoder.blocks.{block}.attn.qkv.{part}" for block in (0, 1) for part in parts]
    assert torch.equal(tensors["encoder.blocks.1.attn.qkv.magnitude"], stored[STORED_NAMES[-1]])
    load_adapter(adapted("lora", tiny, dora=True), tmp_path)


def test_write_hf_adapter__conv_lora_or_a_file_in_the_way__is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCombination, match=r"conv_lora.*AutoGluon's can: use to_autogluon"):
        write_hf_adapter(tmp_path, adapted("conv_lora"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_hf_adapter(tmp_path / "file", adapted())


FAULTS: list[tuple[Options, str]] = [
    ({"lora_alpha": 16}, r"by 5\.33333 .*by 10\.6667.*optim\.lora\.alpha=16 and optim\.lora\.scaling=rank"),
    ({"use_rslora": True}, r"rule sqrt_rank.*optim\.lora\.alpha=32 and optim\.lora\.scaling=sqrt_rank"),
    ({"r": 2}, "damaged: its r or use_dora"),
    ({"use_dora": True}, "damaged: its r or use_dora"),
    ({"r": True}, "'r' is True; allowed: 1, 2"),
    ({"r": 10**400}, "'r' is 1000"),
    ({"lora_alpha": None}, "'lora_alpha' is None; allowed: a number"),
    ({"lora_alpha": float("nan")}, "'lora_alpha' is nan"),
    ({"use_dora": "yes"}, "'use_dora' is yes; allowed: true, false"),
    ({"peft_type": "LOHA"}, "'peft_type' is LOHA; allowed: LORA"),
    ({"bias": "lora_only"}, "'bias' is lora_only; allowed: none"),
    ({"init_lora_weights": "pissa"}, "'init_lora_weights' is pissa; allowed: True, False, gaussian"),
    ({"rank_pattern": {"blocks.0": 4}}, "'rank_pattern' is .*allowed: null"),
    ({"of_a_later_version": 1}, "'of_a_later_version' is 1"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_load_adapter__options_of_peft_that_do_not_fit__are_refused(
    tmp_path: Path, change: Options, message: str
) -> None:
    model = adapted()
    before = embeddings(model)
    write_hf_adapter(tmp_path, adapted(seed=2))
    (tmp_path / "adapter_config.json").write_text(json.dumps(json.loads(WRITTEN_CONFIG) | change), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, tmp_path)
    assert torch.equal(embeddings(model), before)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 2**19], ids=["cut", "list", "bytes", "deep"])
def test_read_hf_adapter__damaged_options__are_refused(tmp_path: Path, content: bytes) -> None:
    write_hf_adapter(tmp_path, adapted())
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="no JSON object"):
        read_hf_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(content + b" " * 2**20)
    with pytest.raises(CheckpointError, match="larger than 1048576 bytes"):
        read_hf_adapter(tmp_path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_read_hf_adapter__missing_file__is_named(tmp_path: Path, file: str) -> None:
    write_hf_adapter(tmp_path, adapted())
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=f"no '{file}'"):
        load_adapter(adapted(), tmp_path)


@pytest.mark.parametrize("name", ["vision_encoder.layers.0.attn.proj.lora_A.weight", "mask_decoder.iou_token.weight"])
def test_read_hf_adapter__other_target__is_refused(tmp_path: Path, name: str) -> None:
    write_hf_adapter(tmp_path, adapted())
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.{name}": torch.zeros(3, 32)}, path)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}' is no tensor of LoRA.*target qkv alone"):
        load_adapter(adapted(), tmp_path)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({"rank": 4, "alpha": 32 * 4 / 3}, {}, r"block 0 has rank 4, the model 3\. Set optim\.lora\.rank=4"),
        ({"build": lambda: sam(width=64)}, {}, r"has width 64, the model 32\. Set model\.encoder"),
        ({"build": lambda: sam(depth=3)}, {}, r"blocks \[0, 1, 2\]; of the model's 2, \[0, 1\].*Set model\.encoder"),
        ({"last_blocks": 1}, {}, r"blocks \[1\]; of the model's 2, \[0, 1\] are.*optim\.lora\.last_blocks=1"),
        ({}, {"last_blocks": 1}, r"blocks \[0, 1\]; of the model's 2, \[1\] are.*optim\.lora\.last_blocks=2"),
        ({"dora": True}, {}, r"'magnitude' has the shape \(96,\), in the model None\. Set optim\.lora\.dora=True"),
        ({}, {"dora": True}, r"'magnitude' has the shape None.*optim\.lora\.dora=False"),
        ({}, {"method": "conv_lora"}, r"holds lora, the model has conv_lora\. Set optim\.peft=lora"),
        ({"build": tiny}, {}, r"adapts blocks, the model vision_encoder\.layers"),
        ({}, {"build": tiny}, r"adapts vision_encoder\.layers, the model blocks"),
    ],
)
def test_load_adapter__folder_of_another_model__names_both_sides_and_the_setting(
    tmp_path: Path, source: Options, target: Options, message: str
) -> None:
    write_hf_adapter(tmp_path, adapted(**source))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(adapted(**target), tmp_path)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({"experts": 3}, CONV, r"block 0 has experts 3, the model 2\. Set optim\.lora\.experts=3"),
        (CONV, {**CONV, "rank": 2, "alpha": 32}, r"has rank 3, the model 2\. Set optim\.lora\.rank=3"),
        (CONV, {"method": "lora"}, r"holds conv_lora, the model has lora\. Set optim\.peft=conv_lora"),
        (CONV, {**CONV, "decoder": QUERIES}, r"mask_tokens\.weight' is \(1, 32\), in the model \(4, 32\).*num_queries"),
        ({**CONV, "decoder": QUERIES}, {**CONV, "decoder": MORE}, r"class_head\.bias' is \(4,\), in the model \(6,\)"),
        (CONV, {**CONV, "decoder": {"detail": True}}, r"detail.* is missing, in the model .*without model\.detail"),
        (CONV, {**CONV, "decoder_rank": 2}, r"without model\.detail and optim\.lora\.decoder_rank"),
        (CONV, {**CONV, "build": tiny}, r"adapts vision_encoder\.layers, the model blocks"),
    ],
)
def test_load_adapter__autogluon_file_of_another_model__names_both_sides_and_the_setting(
    tmp_path: Path, source: Options, target: Options, message: str
) -> None:
    path = autogluon_file(tmp_path, adapted(**{"method": "conv_lora", **source}))
    model = adapted(**{"method": "conv_lora", **target})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("without", "further", "message"),
    [
        ("vision_encoder", "", r"is no SAM of AutoGluon's: its names are \['model\.model\.mask_decoder"),
        ("^$", "other.vision_encoder.pos_embed", r"prefixes \['model\.model\.', 'other\.'\]"),
        (r"\.0\.0\.bias", "", r"expert_bias' has experts \[1\] of shapes \[\(3,\)\], needed are 0, 1"),
        ("w_noise", "", r"'w_noise' has the shape None, in the model \(3, 2\).*damaged"),
        ("iou_token", "", r"'mask_decoder\.iou_token\.weight' is missing, in the model \(1, 32\)"),
        ("^$", "model.model.vision_encoder.layers.0.attn.proj.lora_A", r"attn\.proj\.lora_A' is no tensor of LoRA"),
        ("^$", "model.model.vision_encoder.layers.0.attn.qkv.lora_moe_gating.x", r"gating\.x' is no tensor of LoRA"),
        ("^$", "model.model.vision_encoder.layers.0.attn.qkv.x", r"qkv\.x' is \(3, 32\), in the model missing"),
        ("^$", "model.model.vision_encoder.pos_embed", r"pos_embed' is \(3, 32\), in the model \(1, 4, 4, 32\)"),
        ("^$", "model.model.memory_encoder.x", r"'memory_encoder\.x'"),
    ],
)
def test_load_adapter__damaged_or_other_file__is_refused(
    tmp_path: Path, without: str, further: str, message: str
) -> None:
    path = autogluon_file(tmp_path, adapted("conv_lora", **CONV), without, further)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(adapted("conv_lora", **CONV), path)


def test_load_adapter__decoder_without_adapters__is_refused(tmp_path: Path, theirs: Any) -> None:
    torch.save({f"model.{name}": tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "sam.pth")
    with pytest.raises(CheckpointError, match=r"no adapter on attn\.qkv"):
        load_adapter(adapted(), tmp_path / "sam.pth")


def test_load_adapter__model_that_can_take_none__is_refused(tmp_path: Path) -> None:
    path = autogluon_file(tmp_path, adapted("conv_lora"))
    with pytest.raises(UnsupportedCombination, match=r"optim\.lora\.activation is none, gelu with AutoGluon"):
        load_adapter(adapted("conv_lora", activation="none"), path)
    with pytest.raises(UnsupportedCombination, match=r"no adapted attn\.qkv"):
        load_adapter(adapted("decoder_only"), path)
    with pytest.raises(CheckpointError, match="no adapter at"):
        load_adapter(adapted("conv_lora"), tmp_path / "absent.ckpt")
