"""`train_vae.py` and `train_diffusion.py` at toy sizes: they resume bit for bit, and what they write is a model."""

import importlib.util
import json
import math
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import models
from diffusion import Schedule
from inversion import InversionError, read_folder
from models import GlideModel, LatentModel
from models.text import ClipText
from tests.disk import full_disk
from tests.tiny import tiny_glide

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    """A script as a module, its neighbours importable."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location(f"oneword_{name}", SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned 16x16 images."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "art").mkdir()
    rows = []
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "art" / f"{i}.png")
        captions = [f"thing {i}", f"a drawing of thing {i}"]
        rows.append({"file": f"art/{i}.png", "name": f"thing {i}", "captions": captions})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def vae_config(data: Path, output: Path, **more: object) -> object:
    shape = {"size": 16, "latent_channels": 4, "channel_mult": (1, 1), "steps": 4, "batch_size": 2}
    return script("train_vae").Config(images=data / "art", output=output, dtype="float32", **(shape | more))


@pytest.fixture(scope="module")
def vae(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "vae"
    script("train_vae").main(vae_config(data, output))
    return output


def diffusion_config(data: Path, vae: Path | None, output: Path, **more: object) -> object:
    shape = {"model_channels": 32, "channel_mult": (1, 1), "head_channels": 16, "text_width": 32, "text_layers": 1}
    shape |= {"text_heads": 2, "vocab_size": 560, "context_length": 16, "steps": 4, "batch_size": 2}
    shape |= {"text_steps": 1}
    return script("train_diffusion").Config(data=data, vae=vae, output=output, dtype="float32", **(shape | more))


def interrupted_at(module: ModuleType, step: int, config: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script's main until Ctrl-C comes in the middle of a step."""
    update = module.Trainer.update

    def impatient(self: object, loss: torch.Tensor) -> float:
        if self.step == step:
            raise KeyboardInterrupt
        return update(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(module.Trainer, "update", impatient)
        with pytest.raises(KeyboardInterrupt):
            module.main(config)


def same(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_interrupted_autoencoder_resumes_bit_for_bit(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("train_vae")
    interrupted_at(module, 2, vae_config(data, tmp_path / "vae"), monkeypatch)
    assert not (tmp_path / "vae" / "vae.safetensors").exists()
    module.main(vae_config(data, tmp_path / "vae", resume=True))
    assert same(vae / "vae.safetensors", tmp_path / "vae" / "vae.safetensors")
    assert (vae / "config.json").read_text() == (tmp_path / "vae" / "config.json").read_text()


def test_masters_are_the_weights_as_they_were_before_they_were_rounded() -> None:
    layer = torch.nn.Linear(3, 5)
    exact = [p.detach().clone() for p in layer.parameters()]
    trainer = script("_training").Trainer({"layer": layer}, 1e-3, 10, 1, 0.9, torch.bfloat16)
    for known in (trainer.master, trainer.average):
        assert all(torch.equal(mine, weight) for mine, weight in zip(known, exact))
    assert all(torch.equal(p, weight.bfloat16()) for p, weight in zip(layer.parameters(), exact))


def test_updates_are_adamw_on_clipped_gradients_and_the_average_follows() -> None:
    """Against torch's AdamW, with the published warm-up, cosine and average written out."""
    layer, rate, warmup, steps, highest = torch.nn.Linear(3, 2), 0.1, 3, 9, 0.4
    peers = [torch.nn.Parameter(p.detach().clone()) for p in layer.parameters()]
    average = [p.detach().clone() for p in peers]
    trainer = script("_training").Trainer({"layer": layer}, rate, steps, warmup, highest)
    optimizer = torch.optim.AdamW(peers, betas=(0.9, 0.99), weight_decay=0.01)
    x = torch.randn(steps, 5, 3, generator=torch.Generator().manual_seed(0))
    for k in range(steps):
        size = (1e3, 1e-3)[k % 2]                                       # every other gradient is longer than 1
        trainer.update(size * layer(x[k]).square().sum())
        loss = size * torch.nn.functional.linear(x[k], *peers).square().sum()
        gradients = torch.autograd.grad(loss, peers)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        for peer, gradient in zip(peers, gradients):
            peer.grad = gradient / max(1.0, norm.item())
        up, down = (k + 1) / warmup, (1 + math.cos(math.pi * (k - warmup) / (steps - warmup))) / 2
        optimizer.param_groups[0]["lr"] = rate * (up if k < warmup else down)
        optimizer.step()
        decay = min(highest, (2 + k) / (11 + k))                        # after k + 1 steps
        average = [decay * mean + (1 - decay) * peer.detach() for mean, peer in zip(average, peers)]
        for ours, theirs in ((trainer.master, peers), (list(layer.parameters()), peers), (trainer.average, average)):
            for mine, other in zip(ours, theirs):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)        # float32, nine steps


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [   # of black pixels; absolute distance + edges + opponent colours, of which each row is squared
        # red one too high: 1/3 of the numbers; (1/sqrt 3)^2, 2^2 (1/sqrt 2)^2 and 4^2 (1/sqrt 6)^2 in the three rows
        ([[[1, 1], [1, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]], 1 / 3 + 0 + (1 / 3 + 2 + 8 / 3) / 3),
        # a grey column, a grey row: half of the numbers; one step of 1 across it; (3/sqrt 3)^2 of half the pixels
        ([[[0, 1], [0, 1]]] * 3, 1 / 2 + 1 + (3 / 2) / 3),
        ([[[0, 0], [1, 1]]] * 3, 1 / 2 + 1 + (3 / 2) / 3),
    ],
)
def test_an_autoencoder_s_loss_is_the_sum_that_its_text_promises(wrong: list, expected: float) -> None:
    moments = torch.tensor([2.0, math.log(4)])[None, :, None, None]                  # mean 2, variance 4
    vae = SimpleNamespace(
        encode=lambda images: moments, sample=lambda moments, noise: noise, decode=lambda z: torch.tensor([wrong]) - 1.0
    )
    loss = script("train_vae").autoencoder_loss(vae, -torch.ones(1, 3, 2, 2), torch.zeros(1, 1, 1, 1), 0.5)
    divergence = (2**2 + 4 - 1 - math.log(4)) / 2                                    # of N(2, 4) from N(0, 1)
    assert loss.item() == pytest.approx(expected + 0.5 * divergence, rel=1e-6)       # float32


def test_latents_are_standardised_and_decoding_does_not_notice(data: Path) -> None:
    module, images = script("train_vae"), script("_pictures").read_captioned(data)[0].double()
    torch.manual_seed(0)
    vae = module.VAE(module.VAEConfig(3, 4, 32, (1, 1), 1, 1.0)).double()
    with torch.no_grad():
        mean, logvar = vae.encode(images).chunk(2, dim=1)
        decoded = vae.decode(mean)
        module.standardise(vae, images)
        mean_after, logvar_after = vae.encode(images).chunk(2, dim=1)
        std_after, zero = torch.std_mean(mean_after, dim=(0, 2, 3))
        # float64 sums over 384 numbers a channel, and a network's worth of roundings
        torch.testing.assert_close(std_after, torch.ones_like(std_after), rtol=1e-10, atol=0)
        torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-10)
        torch.testing.assert_close(vae.decode(mean_after), decoded, rtol=0, atol=1e-9)
        spread = mean.std(dim=(0, 2, 3))[None, :, None, None]
        torch.testing.assert_close(logvar_after, logvar - 2 * spread.log(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("text_steps", [1, 3])  # the third update is of both networks, or of the text alone
def test_an_interrupted_diffusion_model_resumes_bit_for_bit(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_steps: int
) -> None:
    module = script("train_diffusion")
    module.main(diffusion_config(data, vae, tmp_path / "whole", text_steps=text_steps))
    interrupted_at(module, 2, diffusion_config(data, vae, tmp_path / "halves", text_steps=text_steps), monkeypatch)
    assert (tmp_path / "halves" / "training.pt").exists() == (text_steps == 1)
    module.main(diffusion_config(data, vae, tmp_path / "halves", text_steps=text_steps, resume=True))
    file = "model/unet/diffusion_pytorch_model.safetensors"
    assert same(tmp_path / "whole" / file, tmp_path / "halves" / file)
    file = "model/text_encoder/model.safetensors"
    assert same(tmp_path / "whole" / file, tmp_path / "halves" / file)
    model = models.load(tmp_path / "halves" / "model")
    assert (model.resolution, model.prediction, model.width) == (16, "v_prediction", 32)
    assert model.dtype == torch.float32  # float16 in the file, and this is a CPU
    features = model.encode_text(model.tokenizer.encode([""]))
    answer = model.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), features)
    assert answer.abs().max() > 0  # the last layer started at zero: it was trained


def test_what_the_text_transformer_is_taught_tells_captions_apart(data: Path, vae: Path, tmp_path: Path) -> None:
    module = script("train_diffusion")
    images, rows = script("_pictures").read_captioned(data)
    config = diffusion_config(data, vae, tmp_path / "run", text_steps=60)
    model = module.latent_model(config, [caption for row in rows for caption in row["captions"]], 16)
    captions = module.Captions(model.tokenizer, [row["captions"] for row in rows])
    first = model.tokenizer.encode([row["captions"][0] for row in rows])

    def between() -> float:
        """Variance of the mean feature over captions of different images."""
        with torch.no_grad():
            return model.encode_text(first).context.mean(dim=1).var(dim=0).mean().item()

    before = between()
    module.teach_text(model, captions, model.moments(images)[:, :4], config, "")
    state = torch.load(tmp_path / "run" / "text.pt", weights_only=True)         # what goes on is the average
    i = state["names"].index("text.final_layer_norm.weight")
    assert torch.equal(model.text.final_layer_norm.weight, state["average"][i])
    assert between() > 4 * before  # features of variance 1 that differed in a digit or two, of 16 tokens


def test_a_glide_is_trained_and_resumed_bit_for_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, more = script("train_diffusion"), {"size": 8, "steps": 5}
    module.main(diffusion_config(data, None, tmp_path / "whole", **more))
    interrupted_at(module, 3, diffusion_config(data, None, tmp_path / "halves", **more), monkeypatch)
    module.main(diffusion_config(data, None, tmp_path / "halves", **more, resume=True))
    assert same(*(tmp_path / name / "model.safetensors" for name in ("whole", "halves")))
    model = models.load(tmp_path / "whole" / "model.safetensors")
    assert (model.family, model.resolution, model.unet.config.attention) == ("custom-glide", 8, "joint")
    features = model.encode_text(model.tokenizer.encode(["thing 1", ""]))
    answer = model.predict(torch.ones(2, 3, 8, 8), torch.tensor([500, 500]), features)
    assert answer[:, :3].abs().max() > 0          # the last layer started at zero: eps was trained
    assert answer[:, 3:].abs().max() > 0          # and the variance


def test_an_upsampler_is_shown_the_images_that_it_learns_to_draw_in_small(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, drawn, shown = script("train_diffusion"), [], []
    given, draw_x0 = GlideModel.given, GlideModel.draw_x0
    monkeypatch.setattr(GlideModel, "draw_x0", lambda self, *a: (drawn.append(draw_x0(self, *a)), drawn[-1])[1])
    monkeypatch.setattr(GlideModel, "given", lambda self, *a: (shown.append(a[1]), given(self, *a))[1])
    module.main(diffusion_config(data, None, tmp_path / "run", size=8, factor=2, steps=3))
    assert len(shown) == 3
    for x0, small in zip(drawn, shown):
        squares = x0.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean(dim=(3, 5))
        torch.testing.assert_close(small, squares, rtol=0, atol=1e-6)      # means of four float32 numbers
    model = models.load(tmp_path / "run" / "model.safetensors")
    assert (model.factor, model.resolution, model.schedule["name"]) == (2, 8, "linear")


@pytest.mark.parametrize("more", [{"factor": 3}, {"factor": 0}, {"factor": 2, "vae": Path("vae")}])
def test_an_upsampler_that_cannot_be(data: Path, tmp_path: Path, more: dict) -> None:
    with pytest.raises(models.ModelError, match="cannot be"):
        script("train_diffusion").main(diffusion_config(data, more.pop("vae", None), tmp_path / "run", size=8, **more))


def test_a_new_run_says_what_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match="--data"):
        script("train_diffusion").main(diffusion_config(None, None, tmp_path / "run"))


def test_the_variance_is_trained_on_the_bound_and_eps_is_not() -> None:
    module, schedule = script("_lesson"), Schedule("squaredcos_cap_v2")
    output = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x0, noise = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = torch.tensor([300, 700])
    module.objective(tiny_glide(), schedule, output, x0, t, noise).sum().backward()
    # the squared error alone, a mean over 48 numbers: what the bound adds to eps must be nothing at all
    torch.testing.assert_close(output.grad[:, :3], 2 * (output[:, :3] - noise).detach() / 48, rtol=1e-6, atol=1e-9)
    assert output.grad[:, 3:].abs().min() > 0


def test_what_is_written_is_the_average_not_the_last_weights(data: Path, vae: Path, tmp_path: Path) -> None:
    module = script("train_diffusion")
    module.main(diffusion_config(data, vae, tmp_path / "run"))
    state = torch.load(tmp_path / "run" / "training.pt", weights_only=True)
    i = state["names"].index("unet.out.2.bias")
    written = models.load(tmp_path / "run" / "model").unet.out[2].bias
    assert torch.equal(written, state["average"][i].half().float())
    assert not torch.equal(written, state["master"][i].half().float())


def test_training_goes_on_from_the_masters_after_a_save(tmp_path: Path) -> None:
    """The average is rounded once, from float32 to the file's float16, and not by way of the training's bfloat16."""
    module, model = script("train_diffusion"), tiny_glide()
    trainer = module.Trainer(module.networks(model), 1e-3, 10, 1, 0.9, torch.bfloat16)
    for average in trainer.average:
        average.add_(0.123)
    module.export(model, trainer, tmp_path / "model.safetensors", torch.bfloat16, None)
    assert all(torch.equal(w, master.bfloat16()) for w, master in zip(trainer.weights, trainer.master))
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written["out.2.bias"], trainer.average[trainer.names.index("unet.out.2.bias")].half())


def test_of_all_saves_the_one_that_knows_held_out_pictures_best_is_written(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, losses, averages = script("train_diffusion"), iter([0.5, 0.3, 0.4, 0.35]), []

    def judged(self: object, model: LatentModel, schedule: Schedule) -> float:
        averages.append(model.unet.out[2].bias.detach().clone())
        return next(losses)

    monkeypatch.setattr(module.Pictures, "fixed_loss", judged)
    config = {"held_out": data, "save_every": 1}
    interrupted_at(module, 3, diffusion_config(data, vae, tmp_path / "run", **config), monkeypatch)
    module.main(diffusion_config(data, vae, tmp_path / "run", **config, resume=True))       # knows the best so far
    written = models.load(tmp_path / "run" / "model").unet.out[2].bias
    assert len(averages) == 4
    assert torch.equal(written, averages[1].half().float())
    assert not torch.equal(written, averages[3].half().float())


def test_held_out_pictures_are_judged_alike_without_their_captions(data: Path, vae: Path, tmp_path: Path) -> None:
    module = script("train_diffusion")
    images, rows = script("_pictures").read_captioned(data)
    model = module.latent_model(diffusion_config(data, vae, tmp_path), [c for r in rows for c in r["captions"]], 16)
    for weight in model.unet.parameters():
        if not weight.any():            # branches start as silence, in which neither a picture nor a caption is heard
            torch.nn.init.normal_(weight, std=0.1)
    schedule, nameless = Schedule(**model.schedule), [row | {"captions": ["another thing"]} for row in rows]
    known, unknown = (module.Pictures.of(model, images, None, each) for each in (rows, nameless))
    loss = known.fixed_loss(model, schedule)
    assert known.fixed_loss(model, schedule) == loss
    assert unknown.fixed_loss(model, schedule) == loss
    assert module.Pictures.of(model, -images, None, rows).fixed_loss(model, schedule) != loss


def test_held_out_pictures_are_judged_by_512_different_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight batches of 64, whose generators give different numbers, and the mean of their losses."""
    module, first = script("_lesson"), []

    def loss(self: object, model: object, schedule: object, b: int, g: torch.Generator, dropout: float) -> torch.Tensor:
        assert (b, dropout) == (64, 1.0)
        first.append(torch.rand(1, generator=g).item())
        return torch.tensor(float(len(first)))

    monkeypatch.setattr(module.Pictures, "loss", loss)
    assert module.Pictures(torch.zeros(1), None, None).fixed_loss(None, None) == 4.5         # the mean of 1 to 8
    assert len(set(first)) == 8


def test_captions_are_dropped_with_the_probability_that_was_set(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, seen = script("train_diffusion"), []
    forward = ClipText.forward
    monkeypatch.setattr(
        ClipText, "forward", lambda self, ids, extra=None: (seen.append(ids), forward(self, ids, extra))[1]
    )
    numbers = {"text_steps": 0, "steps": 20, "batch_size": 20, "caption_dropout": 0.3}
    module.main(diffusion_config(data, vae, tmp_path / "run", **numbers))
    empty = models.load(tmp_path / "run" / "model").tokenizer.encode([""]).ids
    dropped = (torch.cat(seen) == empty).all(dim=1).float().mean().item()
    assert dropped == pytest.approx(0.3, abs=0.09)  # four standard errors of 400 draws, sqrt(0.21 / 400) = 0.023


def test_a_dropped_caption_is_the_empty_prompt_in_ids_and_mask() -> None:
    """GLIDE's text transformer reads the mask: where it is False stands what was learned of padding."""
    module, tokenizer = script("_lesson"), tiny_glide().tokenizer
    captions = module.Captions(tokenizer, [["one dog"], ["a large dog"]])
    tokens, empty = captions.of(torch.tensor([0, 1, 1]), torch.Generator(), 1.0), tokenizer.encode([""] * 3)
    assert torch.equal(tokens.ids, empty.ids)
    assert torch.equal(tokens.mask, empty.mask)


def test_what_is_to_be_predicted_is_the_noise_in_the_picture() -> None:
    """A model that knows x_0, and so which noise x_t holds, is right: eps = (x_t - sqrt(ab) x_0) / sqrt(1 - ab)."""
    module, schedule = script("_lesson"), Schedule("linear", beta_start=1e-4, beta_end=0.02)

    def predict(x_t: torch.Tensor, t: torch.Tensor, text: object) -> torch.Tensor:
        alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t][:, None, None, None]
        return ((x_t - alpha_bar.sqrt() * 0.5) / (1 - alpha_bar).sqrt()).float()

    model = SimpleNamespace(
        resolution=4, prediction="epsilon", x0_shape=lambda *size: (3, *size), draw_x0=lambda moments, noise: moments,
        encode_text=lambda tokens: None, predict=predict,
    )  # fmt: skip
    captions = module.Captions(tiny_glide().tokenizer, [["a dog"]] * 2)
    pictures = module.Pictures(torch.full((2, 3, 4, 4), 0.5), None, captions)
    loss = pictures.loss(model, schedule, 16, torch.Generator().manual_seed(0), 0.0)
    assert loss.item() < 1e-8                  # float32: at the first times the noise is a hundredth of x_t


def test_a_folder_of_another_run_is_refused(data: Path, vae: Path) -> None:
    with pytest.raises(ValueError, match="already holds something"):
        script("train_vae").main(vae_config(data, vae))


def test_a_run_is_resumed_with_the_flags_it_was_started_with(data: Path, vae: Path) -> None:
    with pytest.raises(ValueError, match="has latent_channels 4, not 8: leave it out"):
        script("train_vae").main(vae_config(data, vae, latent_channels=8, resume=True))


def test_a_checkpoint_of_other_networks_is_refused(data: Path, vae: Path, tmp_path: Path) -> None:
    shutil.copytree(vae, tmp_path / "vae")
    flags = json.loads((vae / "run.json").read_text()) | {"latent_channels": 8}
    (tmp_path / "vae" / "run.json").write_text(json.dumps(flags))
    with pytest.raises(models.ModelError, match="other networks"):
        script("train_vae").main(vae_config(data, tmp_path / "vae", latent_channels=8, resume=True))


def test_a_signal_waits_for_the_end_of_its_step(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("train_vae")
    step = torch.optim.AdamW.step

    def interrupted(self: object, *arguments: object) -> object:
        answer = step(self, *arguments)
        if next(iter(self.state.values()))["step"] == 2:
            signal.raise_signal(signal.SIGINT)  # weights are updated, their average is not
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module.main(vae_config(data, tmp_path / "vae"))
    assert torch.load(tmp_path / "vae" / "training.pt", weights_only=True)["step"] == 2
    module.main(vae_config(data, tmp_path / "vae", resume=True))
    assert same(vae / "vae.safetensors", tmp_path / "vae" / "vae.safetensors")


def test_a_signal_while_the_end_is_saved_is_not_lost(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("train_vae")
    save = module.Trainer.save

    def interrupted(self: object, path: Path) -> None:
        save(self, path)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(module.Trainer, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module.main(vae_config(data, tmp_path / "vae"))
    assert not (tmp_path / "vae" / "vae.safetensors").exists()
    module.main(vae_config(data, tmp_path / "vae", resume=True))
    assert same(vae / "vae.safetensors", tmp_path / "vae" / "vae.safetensors")


@pytest.mark.parametrize("loss", [lambda w: (0 * w).sum().sqrt(), lambda w: w.sum() * math.nan])
def test_a_step_without_a_finite_gradient_changes_no_weight(loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """That of a root at 0 is none, though the root is 0."""
    layer = torch.nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    trainer = script("_training").Trainer({"layer": layer}, 1e-3, 10, 1, 0.9)
    trainer.update(loss(layer.weight))
    assert all(torch.equal(w, before) for w in (layer.weight, trainer.master[0], trainer.average[0]))
    assert trainer.step == 1
    trainer.update(layer.weight.square().sum())
    assert layer.weight.isfinite().all()
    assert not torch.equal(layer.weight, before)


def test_a_training_that_explodes_stops_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match="lower the learning rate"):
        script("train_vae").main(vae_config(data, tmp_path / "vae", steps=40, learning_rate=1e30))
    assert not (tmp_path / "vae").exists()


def save_trainer(file: Path) -> None:
    script("_training").Trainer({"layer": torch.nn.Linear(30, 50)}, 1e-3, 10, 1, 0.9).save(file)


@pytest.mark.parametrize("room", [0, 100, 300])
@pytest.mark.parametrize(
    "write", [save_trainer, lambda file: script("_runs").write_json(file, "long" * 100)], ids=["state", "json"]
)
def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing_half_written(
    tmp_path: Path, write: Callable[[Path], None], room: int
) -> None:
    with full_disk(room), pytest.raises(OSError, match=r"[Ff]ile .*x'$"):
        write(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changed", ["pictures", "captions", "autoencoder"])
def test_a_training_on_something_else_is_not_gone_on_with(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """It was, in silence."""
    mine, its_vae = (Path(shutil.copytree(each, tmp_path / each.name)) for each in (data, vae))
    module, output = script("train_diffusion"), tmp_path / "run"
    interrupted_at(module, 2, diffusion_config(mine, its_vae, output, save_every=1), monkeypatch)
    if changed == "pictures":
        shutil.copy(mine / "art" / "0.png", mine / "art" / "1.png")
    elif changed == "captions":
        written = (mine / "captions.jsonl").read_text()
        (mine / "captions.jsonl").write_text(written.replace("thing 1", "thing 2"))
    else:
        weights = load_file(its_vae / "vae.safetensors")
        weights["encoder.conv_in.weight"] *= 2
        save_file(weights, its_vae / "vae.safetensors")
    with pytest.raises(models.ModelError, match="holds a training on other pictures, names, captions or latents: "):
        module.main(diffusion_config(mine, its_vae, output, save_every=1, resume=True))


def test_weights_that_are_ruined_are_not_saved_over_good_ones(data: Path, tmp_path: Path) -> None:
    """Nor are they written as a model, if so few steps were left that ten in a row could not fail."""
    module = script("train_vae")
    with pytest.raises(models.ModelError, match="no finite gradient was left at the end, step 4: lower the learning"):
        module.main(vae_config(data, tmp_path / "vae", learning_rate=1e38))
    assert not (tmp_path / "vae" / "vae.safetensors").exists()
    assert not (tmp_path / "vae" / "training.pt").exists()
    module, more = script("train_diffusion"), {"save_every": 1, "learning_rate": 1e38}
    with pytest.raises(models.ModelError, match="no finite gradient was left at the end, step 4"):
        module.main(diffusion_config(data, None, tmp_path / "glide", **more))
    saved = torch.load(tmp_path / "glide" / "training.pt")
    assert saved["step"] < 4
    assert all(master.isfinite().all() for master in saved["master"])


def test_a_checkpoint_that_cannot_be_read(data: Path, vae: Path, tmp_path: Path) -> None:
    shutil.copytree(vae, tmp_path / "vae")
    checkpoint = tmp_path / "vae" / "training.pt"
    good = torch.load(checkpoint)
    for write in (
        lambda: checkpoint.write_bytes(b"PK\x03\x04 no more"),
        lambda: torch.save({"weights": torch.ones(1)}, checkpoint),
        lambda: torch.save([1], checkpoint),
        lambda: torch.save(good | {"step": "x"}, checkpoint),
        lambda: torch.save(good | {"optimizers": []}, checkpoint),
        lambda: torch.save(good | {"optimizers": [{}]}, checkpoint),
    ):
        write()
        with pytest.raises(models.ModelError, match="is damaged"):
            script("train_vae").main(vae_config(data, tmp_path / "vae", resume=True))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"steps": 0}, "--steps must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"learning_rate": -1.0}, "--learning-rate must be a number above 0"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"seed": 2**32}, "--seed lies between 0 and 4294967295"),
        ({"channel_mult": ()}, "--channel-mult are numbers above 0, at least one"),
        ({"attention_resolutions": (2, 3)}, r"--attention-resolutions are among 1, 2 with .*, not \(2, 3\)"),
        ({"caption_dropout": 2.0}, "is a probability"),
        ({"text_heads": 7}, "cannot be divided among 7 heads"),
        ({"head_channels": 64}, "has 32 channels, no multiple of 64"),
    ],
)
def test_flags_that_make_no_sense_leave_nothing(
    data: Path, vae: Path, tmp_path: Path, flags: dict, said: str
) -> None:
    with pytest.raises(models.ModelError, match=said):
        script("train_diffusion").main(diffusion_config(data, vae, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()
    if not flags.keys() & {"attention_resolutions", "caption_dropout", "text_heads", "head_channels"}:
        with pytest.raises(models.ModelError, match=said):
            script("train_vae").main(vae_config(data, tmp_path / "run", **flags))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"channels": 30}, "30 channels cannot be divided among 8 groups"),
        ({"channels": 0}, "--channels must be at least 1"),
        ({"latent_channels": 0}, "--latent-channels must be at least 1"),
        ({"kl": float("nan")}, "--kl must be at least 0, not nan"),
        ({"kl": -1.0}, "--kl must be at least 0"),
    ],
)
def test_flags_of_no_autoencoder_leave_nothing(data: Path, tmp_path: Path, flags: dict, said: str) -> None:
    with pytest.raises(models.ModelError, match=said):
        script("train_vae").main(vae_config(data, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_writes_its_model_again(data: Path, vae: Path, tmp_path: Path) -> None:
    """The process may have ended between the last checkpoint and the model."""
    config = diffusion_config(data, vae, tmp_path / "run")
    script("train_diffusion").main(config)
    file = tmp_path / "run" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, tmp_path / "kept.safetensors")
    shutil.rmtree(tmp_path / "run" / "model")
    script("train_diffusion").main(diffusion_config(data, vae, tmp_path / "run", resume=True))
    assert same(file, tmp_path / "kept.safetensors")


def test_a_picture_that_cannot_be_read_is_named(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    whole = (data / "art" / "3.png").read_bytes()
    (tmp_path / "data" / "art" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InversionError, match=r"3\.png is damaged or cut short"):
        script("_pictures").read_captioned(tmp_path / "data")


def test_a_captioned_picture_looks_as_it_does_to_the_autoencoder(data: Path, tmp_path: Path) -> None:
    """What is transparent was the colour that lies hidden there, 16 bits were white, and a turned camera's lay down."""
    shutil.copytree(data, tmp_path / "data")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6                                                  # orientation: the camera lay on its side
    Image.fromarray(pixels).save(tmp_path / "data" / "art" / "0.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "data" / "art" / "1.png")
    Image.fromarray(pixels[..., :3].copy()).save(tmp_path / "data" / "art" / "2.png", exif=turned)
    images, _ = script("_pictures").read_captioned(tmp_path / "data")
    assert torch.equal(images, read_folder(tmp_path / "data" / "art", 16))


def test_what_was_not_begun_cannot_resume(data: Path, vae: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the folder of a run"):
        script("train_vae").main(vae_config(data, tmp_path, resume=True))
    with pytest.raises(ValueError, match="not the folder of a run"):
        script("train_diffusion").main(diffusion_config(data, vae, tmp_path, resume=True))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "has no captions.jsonl"),
        ([""], "equally many captions"),
        (["{"], "a line of .* is not"),
        (['{"file": "art/0.png", "name": "a"}'], "a line of .* is not"),
        (['{"file": "art/0.png", "name": "a", "captions": []}'], "at least one"),
        (['{"file": "art/0.png", "name": "a", "captions": "a dog"}'], "captions are a list"),
        (['{"file": 7, "name": "a", "captions": ["a"]}'], "a line of .* is not .*7 is no text"),
        (['{"file": "art/0.png", "name": {"a": 1}, "captions": ["a"]}'], "a line of .* is not .*{'a': 1} is no text"),
        (['{"file": "art/0.png", "name": "a", "captions": ["a", null]}'], "a line of .* is not .*None is no text"),
        (['{"file": "a", "name": "a", "captions": ["a"]}', '{"file": "b", "name": "b", "captions": []}'], "equally"),
    ],
)
def test_captions_that_cannot_be_used(tmp_path: Path, lines: list[str] | None, said: str) -> None:
    if lines is not None:
        (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    with pytest.raises(models.ModelError, match=said):
        script("_pictures").read_captioned(tmp_path)


def test_captioned_images_of_two_sizes_are_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    Image.new("RGB", (16, 8)).save(tmp_path / "data" / "art" / "3.png")
    with pytest.raises(models.ModelError, match="different heights and widths"):
        script("_pictures").read_captioned(tmp_path / "data")


@pytest.mark.parametrize(("sides", "size"), [((16, 8), None), ((8, 8), 16)])
def test_captioned_images_are_neither_squashed_nor_enlarged(
    tmp_path: Path, sides: tuple[int, int], size: int | None
) -> None:
    Image.new("RGB", sides).save(tmp_path / "0.png")
    (tmp_path / "captions.jsonl").write_text('\ufeff{"file": "0.png", "name": "a", "captions": ["a"]}')    # a BOM
    with pytest.raises(models.ModelError, match=f"have {sides[0]}x{sides[1]} pixels: cut them square"):
        script("_pictures").read_captioned(tmp_path, size)


def test_a_size_that_cannot_be_halved(data: Path, tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match="a multiple of 2"):
        script("train_vae").main(vae_config(data, tmp_path / "vae", size=15))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", r"config\.json is not readable JSON"),
        ("config.json", b'{"channel_mult": [1], "x": 1}', r"config\.json does not describe an autoencoder"),
        ("config.json", b'{"channel_mult": [1], "norm_groups": 0}', r"config\.json does not describe an autoencoder"),
        ("vae.safetensors", b"no tensors", r"vae\.safetensors cannot be read; it is truncated or damaged"),
    ],
)
def test_an_autoencoder_that_cannot_be_read(
    data: Path, vae: Path, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    shutil.copytree(vae, tmp_path / "vae")
    (tmp_path / "vae" / name).write_bytes(content)
    with pytest.raises(models.ModelError, match=said):
        script("train_diffusion").main(diffusion_config(data, tmp_path / "vae", tmp_path / "run"))


@pytest.mark.parametrize("flag", ["count", "batch_size"])
def test_fidelity_of_nothing(flag: str) -> None:
    module = script("measure_fidelity")
    with pytest.raises(models.ModelError, match=f"--{flag.replace('_', '-')} is how many captions .* not 0"):
        module.main(module.Config(**{flag: 0}))


@pytest.mark.parametrize("flag", ["sheet", "output"])
def test_fidelity_that_cannot_be_written_is_not_measured(tmp_path: Path, flag: str) -> None:
    module = script("measure_fidelity")
    (tmp_path / "x").touch()
    with pytest.raises(ValueError, match=f"being a file: choose another --{flag}"):
        module.main(module.Config(str(tmp_path / "no model"), **{flag: tmp_path / "x" / "found"}))
    with pytest.raises(ValueError, match=f"--{flag} .* is a folder: name a file"):
        module.main(module.Config(str(tmp_path / "no model"), **{flag: tmp_path}))


def test_ranks_count_the_images_that_lie_nearer() -> None:
    training = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1, 1, 1)
    names = ["dog", "cat", "cat", "owl"]
    drawn = torch.tensor([0.1, 0.1, 2.9, -1.0]).view(4, 1, 1, 1)
    ranks = script("measure_fidelity").ranks_of_names(drawn, training, names, ["dog", "cat", "cat", "owl"])
    assert ranks.tolist() == [0, 1, 1, 3]


def test_fidelity_of_a_model_that_was_just_trained(data: Path, vae: Path, tmp_path: Path) -> None:
    script("train_diffusion").main(diffusion_config(data, vae, tmp_path / "run"))
    module, output = script("measure_fidelity"), tmp_path / "found.json"
    written = {"output": output, "sheet": tmp_path / "sheet.png"}
    module.main(module.Config(str(tmp_path / "run" / "model"), count=4, steps=2, batch_size=3, **written))
    found = json.loads(output.read_text())
    assert found["captions"] == 4
    assert 0 <= found["top1"] <= found["top5"] <= 1
    training, names, captions = module.read_training_set(tmp_path / "run" / "model")
    (tmp_path / "training_latents.safetensors").write_bytes(b"no tensors")
    with pytest.raises(models.ModelError, match="truncated or damaged"):
        module.read_training_set(tmp_path)
    images, rows = script("_pictures").read_captioned(data)
    mean = script("_untrained").load_vae(vae).encode(images).chunk(2, dim=1)[0]
    # float16 keeps 11 bits of numbers of about one
    torch.testing.assert_close(training, mean, rtol=0, atol=1 / 32 + 1e-6)
    assert names == [row["name"] for row in rows]
    assert all(caption in row["captions"] for caption, row in zip(captions, rows))
