"""Both sides of a benchmark do the same work: equal weights, equal steps, in a network small enough for a test."""

from functools import partial
from pathlib import Path

import _networks
import glide
import guided_step
import inversion_step
import load
import pytest
import shares
import torch
from _process import Work
from torch import Tensor, nn

from diffusion import Schedule
from inversion import Concept
from inversion.objective import Batch, denoising_loss
from models.glide_text import GlideTextConfig
from models.layers import Upsample, conv3x3
from models.presets import COSINE, LINEAR, TINY, GlidePreset
from models.sliced_attention import sliced_attention
from models.unet import UNetConfig

WORK = Work("a step", "float32", TINY.resolution)
RATE, DECAY, EPSILON = 5e-4, 1e-2, 1e-8         # of AdamW in diffusers' example script


def close(ours: Tensor, peer: Tensor) -> None:
    # float32 through some twenty layers whose sums are taken in another order
    torch.testing.assert_close(ours, peer, rtol=1e-4, atol=1e-4 * peer.abs().max().item())


def test_guided_steps_are_one_step() -> None:
    ours = guided_step.start_ours(_networks.ours(WORK, TINY), WORK)
    peer = guided_step.start_peer(_networks.peer(WORK, TINY), WORK)
    for _ in range(2):
        close(ours(), peer())


@pytest.mark.parametrize("work", ["glide_guided_step", "glide_upsampler_step", "glide_inversion_step"])
def test_glides_steps_are_those_of_openais_code(work: str) -> None:
    pytest.importorskip("glide_text2im", reason="OpenAI's code is on no registry")
    enlarges = work == "glide_upsampler_step"
    unet = UNetConfig(
        6 if enlarges else 3, 6, 32, (1, 2), 1, (1, 2), None, 16, 32, attention="joint", resblock_updown=True,
        scale_shift=True,
    )  # fmt: skip
    text = GlideTextConfig(4000, 16, 32, 2, 2, 128)
    preset = GlidePreset(unet, text, LINEAR, 32, 4) if enlarges else GlidePreset(unet, text, COSINE, 16)
    work = Work(work, "float32", preset.resolution)
    answer, expected = (
        glide.start_ours(glide.ours(work, preset), work)(), glide.start_peer(glide.peer(work, preset), work)(),
    )  # fmt: skip
    if work.work == "glide_inversion_step":
        expected = expected[glide.DOG][None]
    close(answer, expected)


def test_the_peer_moves_its_new_row_as_adamw_would_and_no_other() -> None:
    model = _networks.ours(WORK, TINY)
    networks = partial(inversion_step.TRAINED_PEER, preset=TINY)(WORK)
    step = inversion_step.start_peer(networks, WORK)
    table = networks.text.get_input_embeddings().weight
    before = table.detach().clone()
    torch.manual_seed(3)
    step()
    expected = before.clone()
    gradient = our_gradient(model, before[-1:], seed=3)
    expected[-1] = before[-1] * (1 - RATE * DECAY) - RATE * gradient / (gradient.abs() + EPSILON)
    assert torch.equal(table[:-1], before[:-1])
    assert len(table) == TINY.text.vocab_size + 1
    # the two sides' gradients differ by rounding, which the quotient forgets where it is far from epsilon
    assert gradient.abs().min() > 10 * EPSILON
    # a few roundings of float32 numbers below 1; decay moves a number of this table by 1e-6, the gradient by 5e-4
    torch.testing.assert_close(table[-1], expected[-1], rtol=0, atol=2e-7)


def our_gradient(model: _networks.LatentModel, vector: Tensor, seed: int) -> Tensor:
    """Of our loss, at the time and with the noise that the peer draws from torch's generator."""
    image, schedule = inversion_step.image(WORK), Schedule(**model.schedule)
    shape = (1, *model.x0_shape(WORK.resolution, WORK.resolution))
    torch.manual_seed(seed)
    draw, noise, t = torch.randn(shape), torch.randn(shape), torch.randint(0, schedule.steps, (1,))
    batch = Batch(model.moments(image), [inversion_step.TEMPLATE], t, draw, noise)
    concept = Concept(inversion_step.WORD, vector.clone().requires_grad_())
    loss = denoising_loss(model, schedule, batch, concept.placeholder, concept).mean()
    return torch.autograd.grad(loss, concept.vectors)[0][0]


@pytest.mark.parametrize("mode", ["plain", "low_memory"])
def test_our_inversion_step_is_a_training_without_its_vae(mode: str) -> None:
    model = _networks.ours(WORK, TINY)
    step = inversion_step.start_ours(model, Work("a step", "float32", TINY.resolution, mode))
    assert step().step == 1
    assert step().step == 2
    assert next(model.vae.parameters()).is_meta
    assert model.checkpointing == ("blocks" if mode == "low_memory" else "none")


def test_a_saved_folder_is_loaded_and_steps_alike(tmp_path: Path) -> None:
    load.write(WORK, tmp_path, TINY)
    work = Work("load", "float32", TINY.resolution)
    load.start_ours(None, work, tmp_path)()
    load.start_peer(None, work, tmp_path)()
    load.check_step(tmp_path)
    ours = torch.load(tmp_path / "ours-float32.pt")
    torch.save(ours * 1.001, tmp_path / "ours-float32.pt")
    with pytest.raises(load.PartFailed, match="differs"):
        load.check_step(tmp_path)


def test_a_profile_knows_a_layer_by_what_it_computes() -> None:
    x = torch.randn(2, 8, 16, 16)
    q = torch.randn(1, 2, 64, 8)
    steps = [
        ("convolution", partial(nn.Conv2d(8, 8, 3), x)),
        ("convolution", partial(forward_and_back, conv3x3(64, 64), torch.randn(1, 64, 4, 4))),         # `unfolded`
        ("convolution", partial(forward_and_back, conv3x3(128, 128), torch.randn(1, 128, 32, 32))),    # `winograd`
        ("convolution", partial(forward_and_back, Upsample(128), torch.randn(1, 128, 32, 32))),        # `doubled`
        ("linear", partial(nn.Conv2d(8, 8, 1), x)),
        ("norms", partial(nn.GroupNorm(4, 8), x)),
        ("attention", partial(sliced_attention, q, q, q)),
        ("rest", partial(torch.nn.functional.silu, x)),
    ]
    for name, step in steps:
        seconds = shares.parts(step)
        assert seconds[name] > 0
        assert sum(seconds[other] for other in shares.PARTS if other not in (name, "rest")) == 0


def forward_and_back(layer: nn.Module, x: Tensor) -> None:
    """A frozen layer, and the gradient of its input."""
    layer.requires_grad_(False)(x.requires_grad_()).sum().backward()
