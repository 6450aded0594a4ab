import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from models import presets, shapes
from models.renaming import LAYOUTS, stored
from models.text import ClipText, ClipTextConfig
from models.unet import UNet
from models.vae import VAE
from models.weights import Part, assign, gather, on_meta

MANIFESTS = Path(__file__).parents[1] / "fixtures" / "manifests"
NETWORKS = {
    "unet1": lambda: UNet(presets.SD1.unet),
    "unet2": lambda: UNet(presets.SD2_V.unet),
    "vae": lambda: VAE(presets.SD1.vae),
    "text1": lambda: ClipText(presets.SD1.text),
    "text2": lambda: ClipText(presets.SD2_V.text),
}
PUBLISHED = {
    "sd_v1_compvis_single_file": {"unet1": "single", "vae": "single", "text1": "single"},
    "sd_v2_stability_single_file": {"unet2": "single", "vae": "single", "text2": "single openclip"},
    "sd_v1_diffusers_unet": {"unet1": "diffusers"},
    "sd_v2_diffusers_unet": {"unet2": "diffusers"},
    "sd_diffusers_vae": {"vae": "diffusers"},
    "sd_diffusers_vae_published": {"vae": "diffusers published"},
    "sd_v1_diffusers_text_encoder": {"text1": "diffusers"},
    "sd_v2_diffusers_text_encoder": {"text2": "diffusers"},
}
UNUSED = {
    "sd_v1_compvis_single_file": 13,
    "sd_v2_stability_single_file": 15,
    "sd_v1_diffusers_text_encoder": 1,
}


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    content = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, (shape, _) in content["tensors"].items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_have_exactly_these_tensors(name: str) -> None:
    left = manifest(name)
    parts = [
        Part(on_meta(NETWORKS[n]), LAYOUTS[re.sub(r"\d", "", n)][layout])
        for n, layout in PUBLISHED[name].items()
    ]
    for part in parts:
        for entry in part.stored:
            assert left.pop(entry.name) == entry.shape, entry.name
    assert all(any(part.layout.leaves(key, part.network) for part in parts) for key in left)
    assert len(left) == UNUSED.get(name, 0)


@pytest.mark.parametrize("name", ["sd_v1_compvis_single_file", "sd_v2_stability_single_file"])
def test_a_single_files_shapes_tell_its_configuration(name: str) -> None:
    preset = presets.SD1 if "v1" in name else presets.SD2_V
    found = manifest(name)
    assert shapes.unet_config(found, name) == preset.unet
    assert shapes.vae_config(found, name) == preset.vae
    assert shapes.text_config(found, name) == preset.text


def test_files_without_openclips_last_block_run_all_that_they_have() -> None:
    unused = ("text_projection", "logit_scale", "resblocks.23")
    found = {
        k: v for k, v in manifest("sd_v2_stability_single_file").items() if not any(u in k for u in unused)
    }
    assert shapes.text_config(found, "") == presets.SD2_V.text


def test_the_24th_block_never_runs_even_where_the_projection_was_pruned() -> None:
    found = {k: v for k, v in manifest("sd_v2_stability_single_file").items() if "text_projection" not in k}
    assert shapes.text_config(found, "").layers == 23


def test_only_the_block_after_the_last_may_be_unused() -> None:
    text = on_meta(lambda: ClipText(ClipTextConfig(layers=5)))
    layout = LAYOUTS["text"]["single openclip"]
    name = "cond_stage_model.model.transformer.resblocks.{}.ln_1.weight"
    assert [n for n in range(8) if layout.leaves(name.format(n), text)] == [5]


TINY = {
    "unet": lambda: UNet(presets.TINY.unet),
    "vae": lambda: VAE(presets.TINY.vae),
    "text": lambda: ClipText(presets.TINY.text),
}


@pytest.mark.parametrize(("role", "layout"), [(role, layout) for role in LAYOUTS for layout in LAYOUTS[role]])
def test_every_layout_comes_back_equal(role: str, layout: str) -> None:
    network, again = TINY[role](), on_meta(TINY[role])
    tensors = gather(Part(network, LAYOUTS[role][layout]))
    assert assign([Part(again, LAYOUTS[role][layout])], tensors, "memory") == []
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS["vae"])
def test_the_vaes_attention_is_found_as_matrix_and_as_convolution(layout: str) -> None:
    network, again = TINY["vae"](), on_meta(TINY["vae"])
    part = Part(network, LAYOUTS["vae"][layout])
    tensors = gather(part)
    for entry in part.stored:
        if entry.either:
            flip = entry.shape[:2] if len(entry.shape) == 4 else (*entry.shape, 1, 1)
            tensors[entry.name] = tensors[entry.name].reshape(flip)
    assign([Part(again, part.layout)], tensors, "memory")
    assert all(torch.equal(again.state_dict()[name], t) for name, t in network.state_dict().items())


def test_openclip_stacks_queries_keys_and_values_in_this_order() -> None:
    text = TINY["text"]()
    attention = text.encoder.layers[0].self_attn
    stacked = gather(Part(text, LAYOUTS["text"]["single openclip"]))
    weight = stacked["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"]
    assert torch.equal(
        weight, torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    )


def test_no_two_parameters_share_a_name() -> None:
    for role, layouts in LAYOUTS.items():
        for name, layout in layouts.items():
            if not name.startswith("single openclip"):
                network = on_meta(TINY[role])
                assert len(stored(network, layout)) == len(network.state_dict()), (role, name)
