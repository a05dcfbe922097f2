"""An IP-Adapter beside a U-Net: its attention against diffusers' own, what a bundle holds of it, what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from tests.conftest import family_settings
from tests.tiny_ip_adapter import ENCODER, save_ip_adapter
from tests.tiny_models import CONSISTENCY_VARIANT
from tgate_engine.bundle import Bundle
from tgate_engine.errors import ExportError
from tgate_engine.graph import REFERENCE
from tgate_engine.report import Silent
from tgate_export.build import export
from tgate_export.families import MODELS
from tgate_export.ip_adapter import Reference, adapted, as_diffusers, attach, fill, inputs_of
from tgate_export.job import Job, prepare
from tgate_export.lora import Lora
from tgate_export.tracing import reference_outputs

VARIANT = "sd15_a"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def checkpoint(family_bundle: Callable[..., tuple[Path, Path]]) -> Path:
    return family_bundle(VARIANT)[0]


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A plain one and a Plus one. Read only."""
    folder = tmp_path_factory.mktemp("adapters")
    return [save_ip_adapter(checkpoint, folder / str(plus), plus=plus) for plus in (False, True)]


def job(checkpoint: Path, adapter: Path, output: Path, **more: Any) -> Job:
    return prepare(replace(family_settings(VARIANT, checkpoint, output), ip_adapter=adapter, **more))


@pytest.fixture
def copied(adapters: list[Path], tmp_path: Path) -> Path:
    """A plain one to change."""
    shutil.copytree(adapters[0].parent, tmp_path / "adapter")
    return tmp_path / "adapter" / adapters[0].name


@pytest.mark.parametrize("plus", [False, True])
def test_attention_is_diffusers(checkpoint: Path, adapters: list[Path], tmp_path: Path, plus: bool) -> None:
    """The U-Net as diffusers loads the adapter, from the picture's embedding on, and as it is attached here."""
    own = adapted(job(checkpoint, adapters[plus], tmp_path).checkpoint)
    assert own is not None
    stored = load_file(adapters[plus])
    split = {
        part: {name.removeprefix(f"{part}."): t for name, t in stored.items() if name.startswith(part)}
        for part in ("image_proj", "ip_adapter")
    }
    theirs: Any = diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    theirs._load_ip_adapter_weights([split])
    ours: Any = diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    attach(ours, own)
    fill(ours, own)
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 24, generator=generator)
    embeds = torch.randn(2, *((1, 5, 24) if plus else (1, 20)), generator=generator)
    scales = torch.tensor([[0.3], [0.8]])
    with torch.no_grad():
        tokens = theirs.encoder_hid_proj([embeds])[0].squeeze(1)
        drawn = ours(latents, 500, encoder_hidden_states=(text, tokens, scales))[0]
        for row, scale in enumerate(scales.flatten().tolist()):
            for processor in theirs.attn_processors.values():
                if hasattr(processor, "scale"):
                    processor.scale = [scale]
            wanted = theirs(latents, 500, encoder_hidden_states=text, added_cond_kwargs={"image_embeds": [embeds]})[0]
            torch.testing.assert_close(drawn[row], wanted[row], rtol=0, atol=TOLERANCE)
        none = ours(latents, 500, encoder_hidden_states=(text, tokens * 0, scales * 0))[0]
        plain: Any = diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet")
        torch.testing.assert_close(none, plain(latents, 500, encoder_hidden_states=text)[0], rtol=0, atol=TOLERANCE)
        assert (drawn - none).abs().max() > 0.05
        conditioning = {"reference.positive": tokens, "reference_scale.positive": torch.full((2, 1), 0.3)}
        with as_diffusers(ours, conditioning) as arguments:  # goldens' way to diffusers' processors, and back
            added = {"image_embeds": arguments["ip_adapter_image_embeds"]}
            again = ours(latents, 500, encoder_hidden_states=text, added_cond_kwargs=added)[0]
        torch.testing.assert_close(again[0], drawn[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(ours(latents, 500, encoder_hidden_states=(text, tokens, scales))[0], drawn)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("plus", [False, True])
def test_what_a_picture_becomes(
    checkpoint: Path, adapters: list[Path], tmp_path: Path, plus: bool, guided: bool
) -> None:
    """As diffusers' pipeline encodes it, for which zeros are another thing to each kind."""
    own = job(checkpoint, adapters[plus], tmp_path).checkpoint
    encoder = CLIPVisionModelWithProjection.from_pretrained(adapters[plus].parent / ENCODER)
    projection = MODELS["sd15"].family.build(own, "ip_adapter")
    state = {name: own.tensors("ip_adapter").read(name) for name, _ in projection.named_parameters()}
    projection.load_state_dict(state)
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipe.load_ip_adapter(
        str(adapters[plus].parent), subfolder="", weight_name=adapters[plus].name, image_encoder_folder=ENCODER
    )
    picture = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    module = MODELS["sd15"].family.reference(own, [encoder, projection], guided=guided)
    assert isinstance(module, Reference)
    with torch.no_grad():
        rows = module(picture)
        image = Image.fromarray(picture[0].numpy())
        embeds = pipe.prepare_ip_adapter_image_embeds(image, None, "cpu", 1, guided)
        (wanted,) = pipe.unet.encoder_hid_proj(embeds)
    assert len(rows) == 1 + guided
    for row, other in zip(rows, wanted, strict=True):
        torch.testing.assert_close(row, other, rtol=0, atol=TOLERANCE)


def test_what_a_bundle_holds(ip_adapter_bundle: Callable[[str, bool], tuple[Path, Path, Path]]) -> None:
    """Tokens and scale go where the text goes, and end where it ends."""
    manifest = Bundle.open(ip_adapter_bundle("sdxl", True)[2]).manifest
    graphs = manifest.shapes[0].graphs
    for name, halves in (("full", 2), ("reuse_self", 2), ("unguided", 1)):
        forms = {tensor.name: tensor.shape for tensor in graphs[name].inputs}
        assert forms["reference.positive"] == ("batch", 6, 48)
        assert forms["reference_scale.positive"] == ("batch", 1)
        assert ("reference.negative" in forms) == (halves == 2)
    for name in ("reuse_cross", "reuse_both"):
        assert not any("reference" in tensor.name for tensor in graphs[name].inputs)
    assert {"reference", "text", "ungated", "gated"} <= {*manifest.goldens}


def test_macs_count_the_pictures_products(
    tiny_bundle: Callable[..., Path], ip_adapter_bundle: Callable[[str, bool], tuple[Path, Path, Path]]
) -> None:
    """Two linear layers of the tokens for each cross-attention, and two products over the tokens for each place."""
    checkpoint, _, bundle = ip_adapter_bundle("sdxl", True)
    plain = Bundle.open(tiny_bundle("conv_projection")).manifest.shapes[0]
    own = Bundle.open(bundle).manifest.shapes[0]
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    seen: list[tuple[int, int]] = []

    def look(module: Any, arguments: Any, _options: Any) -> None:
        seen.append((arguments[0].shape[1], module.to_k.out_features))

    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_pre_hook(look, with_kwargs=True)
    added = {"text_embeds": torch.zeros(1, 24), "time_ids": torch.zeros(1, 6)}
    text = torch.zeros(1, 16, 48)
    unet(torch.zeros(1, *own.latents), 1, encoder_hidden_states=text, added_cond_kwargs=added)
    layers = sum(2 * 6 * 48 * width for _, width in seen)
    products = sum(2 * 6 * places * width for places, width in seen)
    assert plain.size == own.size
    for name, halves in (("full", 2), ("reuse_self", 2), ("unguided", 1), ("reuse_cross", 0), ("reuse_both", 0)):
        without, with_one = plain.graphs[name].macs, own.graphs[name].macs
        assert with_one.paper - without.paper == halves * layers, name
        assert with_one.all - without.all == halves * (layers + products), name


def test_a_consistency_model_has_one_half(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """And so no tokens of no picture."""
    checkpoint = tiny_checkpoint(CONSISTENCY_VARIANT)
    adapter = save_ip_adapter(checkpoint, tmp_path / "adapter", plus=True)
    settings = replace(family_settings("lcm_sdxl", checkpoint, tmp_path / "b"), ip_adapter=adapter)
    assert reference_outputs(prepare(settings)) == ["reference.positive"]


@pytest.mark.slow
def test_it_is_exported_at_two_sizes(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The encoder knows no size: there is one, for all of them."""
    checkpoint = tiny_checkpoint(CONSISTENCY_VARIANT)
    adapter = save_ip_adapter(checkpoint, tmp_path / "adapter", plus=True)
    settings = family_settings("lcm_sdxl", checkpoint, tmp_path / "b", batches=[(1, 4)])
    sizes = [(64, 64), (96, 64)]
    settings = replace(settings, ip_adapter=adapter, height=None, width=None, sizes=sizes)
    manifest = Bundle.open(export(settings, Silent())).manifest
    small, large = (shape.graph(REFERENCE) for shape in manifest.shapes)
    assert small is not None
    assert small == large
    assert [tensor.name for tensor in small.outputs] == ["reference.positive"]
    assert {"reference", "ungated", "ungated-96x64"} <= {*manifest.goldens}


def _text(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        file = adapter.parent / ENCODER / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    return edit


def _tensors(change: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> Callable[[Path], None]:
    return lambda adapter: save_file({n: t.contiguous() for n, t in change(load_file(adapter)).items()}, adapter)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (
            _tensors(lambda own: {n: t for n, t in own.items() if not n.startswith("ip_adapter.1.")}),
            "is for another architecture: it has 3 layers",
        ),
        (
            _tensors(lambda own: {**own, "ip_adapter.3.to_v_ip.weight": torch.zeros(16, 20)}),
            "its ip_adapter.3.to_v_ip is [16, 20], and up_blocks",
        ),
        (_text(lambda config: config.update(projection_dim=24)), "takes 20 numbers, and the image encoder in"),
        (_text(lambda config: config.update(model_type="siglip_vision_model")), "model_type = 'siglip_vision_model'"),
        (_text(lambda config: config.update(num_hidden_layers=4)), "has no tensor"),
        (
            lambda adapter: (adapter.parent / ENCODER / "config.json").unlink(),
            "config.json is missing; --image-encoder",
        ),
        (lambda adapter: (adapter.parent / ENCODER / "model.safetensors").unlink(), "has no safetensors weights"),
    ],
)
def test_what_does_not_fit_is_refused(
    checkpoint: Path, copied: Path, tmp_path: Path, harm: Callable[[Path], None], says: str
) -> None:
    harm(copied)
    with pytest.raises(ExportError) as caught:
        job(checkpoint, copied, tmp_path / "bundle")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_a_unet_that_takes_none(checkpoint: Path, adapters: list[Path], tmp_path: Path) -> None:
    changed = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, changed)
    file = changed / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "only_cross_attention": True}))
    with pytest.raises(ExportError, match="the unet is none that one can be brought to"):
        job(changed, adapters[0], tmp_path / "bundle")


def test_its_extractor_is_read(checkpoint: Path, adapters: list[Path], tmp_path: Path) -> None:
    changed = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, changed)
    (changed / "feature_extractor").mkdir()
    file = changed / "feature_extractor" / "preprocessor_config.json"
    file.write_text(json.dumps({"size": 32, "crop_size": 32, "image_mean": [0.1, 0.2, 0.3]}))
    made = job(changed, adapters[0], tmp_path / "bundle")
    encoders = [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)]
    module = made.family.reference(made.checkpoint, encoders, guided=True)
    torch.testing.assert_close(module.get_buffer("mean").flatten(), torch.tensor([0.1, 0.2, 0.3]))
    file.write_text(json.dumps({"size": 224, "crop_size": 224}))
    with pytest.raises(ExportError, match="has size = 224, and the IP-Adapter's image encoder is shown pictures of 32"):
        job(changed, adapters[0], tmp_path / "bundle")


def test_a_plain_checkpoint_has_no_inputs_of_one(checkpoint: Path, tmp_path: Path) -> None:
    made = prepare(family_settings(VARIANT, checkpoint, tmp_path / "b"))
    assert inputs_of(made.checkpoint) == ()
    assert "reference" not in made.components


def test_with_a_lora(checkpoint: Path, adapters: list[Path], tmp_path: Path) -> None:
    """Which changes other weights than the adapter brings."""
    lora = tmp_path / "lora.safetensors"
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    width = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")[
        f"{layer.removeprefix('unet.')}.weight"
    ].shape
    factors = {"A": torch.ones(1, width[1]), "B": torch.ones(width[0], 1)}
    save_file({f"{layer}.lora_{side}.weight": factor for side, factor in factors.items()}, lora)
    plain, both = (
        job(checkpoint, adapters[0], tmp_path / "b", loras=loras).checkpoint.tensors("unet")
        for loras in ((), (Lora(lora, 0.5),))
    )
    name = layer.removeprefix("unet.")
    torch.testing.assert_close(both.read(f"{name}.weight"), plain.read(f"{name}.weight") + 0.5)
    own = f"{name.removesuffix('.to_q')}.processor.to_k_ip.weight"
    torch.testing.assert_close(both.read(own), load_file(adapters[0])["ip_adapter.1.to_k_ip.weight"])
