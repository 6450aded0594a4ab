"""The trainer on a tiny random model, and on one so simple that its gradient is known in closed form."""

import hashlib
import math
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from guidance import generate
from inversion import Concept, InversionError, Result, StepReport, TrainConfig, Training, train
from inversion.objective import denoising_loss
from inversion.trainer import state_file
from inversion.training import step_generator
from models import ModelError, TextFeatures, Tokens
from tests.disk import full_disk
from tests.tiny import tiny_glide, tiny_model, tiny_tokenizer

START = (0.8, 0.2, 0.6, 0.4)
TEMPLATES = [["a photo of {}", "{}", "a picture of {}"]] * 3
FAST = TrainConfig(
    steps=12,
    batch_size=4,
    accumulation=1,
    learning_rate=1e-2,
    clip_norm=100.0,  # never reached, so that gradients of all sizes are seen
    validate_every=3,
    validation_pairs=2,
    checkpoint_every=4,
)


def images(n: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) * 2 - 1


class Sum:
    """Predicts, at every position, the sum of all numbers of the learned vectors in the prompt.

    With s the sum, the loss of a sample is mean((s - eps)²), and every number of the vectors has the gradient
    2 (s - mean(eps)). No part of it is a torch module, and it knows nothing beyond what the trainer may use.
    """

    family, source, prediction, width, device = "sum", "a test", "epsilon", 4, torch.device("cpu")
    dtype = torch.float32
    schedule = {"name": "linear", "steps": 1000}

    def __init__(self) -> None:
        self.tokenizer, self.released, self.encoded, self.prompts, self.calls = (
            tiny_tokenizer(),
            False,
            0,
            [],
            0,
        )

    def moments(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return images[:, :1, :4, :4]

    def release_encoder(self) -> None:
        self.released = True

    def x0_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (1, 4, 4)

    def draw_x0(self, moments: Tensor, noise: Tensor) -> Tensor:
        return moments + 0.1 * noise

    def embedding(self, token: int) -> Tensor:
        return torch.tensor(START)

    def encode_text(self, tokens: Tokens, extra: Tensor | None = None) -> TextFeatures:
        self.prompts.append(len(tokens.ids))
        if extra is None:
            return TextFeatures(torch.zeros(*tokens.ids.shape, 4))
        rows = (tokens.ids - self.tokenizer.vocab_size).clamp(min=0)
        return TextFeatures(extra[rows] * (tokens.ids >= self.tokenizer.vocab_size)[..., None])

    def predict(self, x_t: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        self.calls += 1
        return features.context.sum((1, 2))[:, None, None, None].expand_as(x_t)


def learn(
    model: Any, config: TrainConfig = FAST, init: str = "dog", n: int | None = None, **options: Any
) -> Result:
    return train(model, Concept.from_text(model, "<x>", init, n), images(), TEMPLATES, config, **options)


def hashes(model: Any) -> dict[str, str]:
    tensors = {**model.unet.state_dict(), **model.text.state_dict(), **model.vae.state_dict()}
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in tensors.items()}


def test_a_place_where_nothing_can_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for file, said in ((tmp_path, "is a folder: name a file"), (tmp_path / "file" / "x", "nothing can be written to")):
        with pytest.raises(InversionError, match=said):
            learn(Sum(), file=file, on_step=lambda report: pytest.fail("a step was taken"))


def test_what_is_no_image_and_no_list_of_templates_is_said_to_be_so() -> None:
    word = Concept.from_text(model := tiny_model(), "<x>", "dog", 1)
    with pytest.raises(InversionError, match="images are a tensor .* not a ndarray"):
        train(model, word, images().numpy(), TEMPLATES)
    with pytest.raises(InversionError, match="templates are N lists of lines, one for every image, not 'a {}'"):
        train(model, word, images(4), "a {}")


@pytest.mark.parametrize("family", ["latents", "pixels"])
def test_in_float64_the_same_is_learned(family: str) -> None:
    """Of the networks, or, where x_0 is the image, of the images alone."""
    new, found = tiny_model if family == "latents" else tiny_glide, []
    for dtype in (torch.float32, torch.float64):
        model = new()
        for network in model.networks().values():
            network.to(dtype if family == "latents" else torch.float32)
        word = Concept.from_text(model, "<x>", "dog", 1)
        found.append(train(model, word, images().to(dtype), TEMPLATES, replace(FAST, steps=3)).concept.vectors)
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)       # Adam divides a gradient by itself: float32's rounding
    assert (found[0] - Concept.from_text(new(), "<x>", "dog", 1).vectors).abs().max() > 1e-3


def test_the_loss_is_scaled_for_a_text_transformer_in_float16_too() -> None:
    """As a file may have it, beside a UNet in float32."""
    model = tiny_model()
    model.text.half()
    word = Concept.from_text(model, "<x>", "dog")
    assert Training(model, word, images(), TEMPLATES, FAST).state.scale == 2.0**16


def test_torch_s_default_dtype_draws_nothing_else() -> None:
    wanted = learn(tiny_model(), replace(FAST, steps=2))
    model = tiny_model()
    try:
        torch.set_default_dtype(torch.float64)
        found = learn(model, replace(FAST, steps=2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.concept.vectors, wanted.concept.vectors)


@pytest.mark.parametrize("make", [tiny_model, tiny_glide])
def test_torch_s_default_device_draws_nothing_else(make: Callable[[], Any]) -> None:
    """Notebooks set it to cuda; meta stands for that, on which no number can be read."""
    wanted = learn(make(), replace(FAST, steps=2))
    drawn = generate(make(), ["a dog"], steps=2, sampler="ddpm", generator=0)
    model, other, shown = make(), make(), images()
    torch.set_default_device("meta")
    try:
        result = train(model, Concept.from_text(model, "<x>", "dog"), shown, TEMPLATES, replace(FAST, steps=2))
        again = generate(other, ["a dog"], steps=2, sampler="ddpm", generator=0)
    finally:
        torch.set_default_device(None)
    assert torch.equal(result.concept.vectors, wanted.concept.vectors)
    assert torch.equal(again, drawn)


# --- the gradient


@pytest.mark.parametrize("n", [1, 3])
def test_the_gradient_is_the_closed_form(n: int | None) -> None:
    model = Sum()
    training = Training(model, Concept.from_text(model, "<x>", "dog", n), images(), TEMPLATES, FAST)
    batch = training._batch(0)
    loss, gradient = training._gradient(training.state)
    s = sum(START) * n
    assert loss == pytest.approx(((s - batch.noise) ** 2).mean().item(), rel=1e-6)  # float32 rounding
    expected = 2 * (s - batch.noise.mean((1, 2, 3))).mean()
    assert torch.allclose(gradient, expected.expand(n, 4), rtol=1e-5)


def test_the_gradient_is_that_of_a_row_of_an_extended_table() -> None:
    """A model whose table really has two more rows: autograd's gradient on those rows is ours."""
    model = tiny_model()
    concept = Concept.from_text(model, "<x>", "white dog")
    training = Training(model, concept, images(), TEMPLATES, FAST, keep_encoder=True)
    loss, gradient = training._gradient(training.state)
    batch = training._batch(0)
    embeddings = model.text.embeddings.token_embedding
    table = torch.cat([embeddings.weight, concept.vectors]).requires_grad_()
    embeddings.weight = torch.nn.Parameter(table)
    other = denoising_loss(Extended(model), training.schedule, batch, "<x>", concept).mean()
    (of_table,) = torch.autograd.grad(other, embeddings.weight)
    assert other.item() == pytest.approx(loss, rel=1e-5)  # the same sums in float32
    assert torch.allclose(of_table[-2:], gradient, rtol=1e-4, atol=1e-7)  # float32 through two networks
    assert gradient.abs().max() > 1e-4


class Extended:
    """A model that reads the learned ids from its own table."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_text(self, tokens: Tokens, extra: Tensor | None) -> TextFeatures:
        return self.model.text(tokens.ids)


def test_accumulated_batches_are_one_batch() -> None:
    model, found = tiny_model(), []
    for batch_size in (8, 2):
        config = replace(FAST, batch_size=batch_size, accumulation=8 // batch_size)
        concept = Concept.from_text(model, "<x>", "dog")
        training = Training(model, concept, images(), TEMPLATES, config, keep_encoder=True)
        found.append(training._gradient(training.state))
    (loss, gradient), (other_loss, other_gradient) = found
    assert loss == pytest.approx(other_loss, rel=1e-5)  # the same samples: float32 rounding
    assert torch.allclose(gradient, other_gradient, rtol=1e-4, atol=1e-7)


def test_every_step_draws_anew() -> None:
    model = Sum()
    training = Training(model, Concept.from_text(model, "<x>", "dog"), images(), TEMPLATES, FAST)
    first, again, second = (training._batch(step) for step in (0, 0, 1))
    for name in ("t", "draw", "noise"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(second, name))


def test_no_two_seeds_share_a_step_s_draws() -> None:
    """Seeds 0 and 1 would, one step apart, if a step's seed were their sum."""
    drawn = {torch.rand((), generator=step_generator(seed, step)).item() for seed in range(9) for step in range(99)}
    assert len(drawn) > 0.99 * 9 * 99                                   # a few of 24 bits may be alike by chance


def test_a_large_gradient_is_clipped() -> None:
    model = Sum()
    model.embedding = lambda token: torch.full((4,), 100.0)
    config = replace(FAST, clip_norm=1.0)
    training = Training(model, Concept.from_text(model, "<x>", "dog"), images(), TEMPLATES, config)
    next(training.steps())
    assert pytest.approx(training.state.mean.norm().item(), rel=1e-5) == (
        0.1 * 1.0
    )  # m = (1 - 0.9) g, |g| = 1


# --- what learns and what does not


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_only_the_vectors_change(prediction: str) -> None:
    model = tiny_model(prediction=prediction)
    for part in (model.unet, model.text, model.vae):
        part.requires_grad_().train()  # as a careless caller may hand them over
    before = hashes(model)
    concept = Concept.from_text(model, "<x>", "dog", n=2)
    start = concept.vectors.clone()
    result = train(model, concept, images(), TEMPLATES, FAST, keep_encoder=True)
    assert hashes(model) == before
    for part in (model.unet, model.text, model.vae):
        assert not part.training
        assert all(not p.requires_grad and p.grad is None for p in part.parameters())
    assert torch.equal(concept.vectors, start)
    assert (result.concept.vectors != start).any(dim=1).all()
    assert result.concept.vectors.dtype == torch.float32
    assert not result.concept.vectors.requires_grad


def test_it_learns_what_can_be_learned() -> None:
    """The best sum of the vectors is the mean of the noise, 0 up to 1/sqrt(16 · 12)."""
    result = learn(Sum(), replace(FAST, steps=150, learning_rate=3e-2))
    assert abs(result.concept.vectors.sum().item()) < 4 / (16 * 12) ** 0.5
    metrics = result.metrics
    assert metrics["validation_loss_best"] < 0.4 * metrics["validation_loss_initial"]
    assert metrics["validation_loss_best"] == pytest.approx(1, abs=0.3)  # the noise itself, 96 numbers of it


def test_a_real_model_s_loss_falls() -> None:
    metrics = learn(tiny_model(), replace(FAST, steps=20)).metrics
    assert metrics["validation_loss_best"] < metrics["validation_loss_initial"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(mode: Callable[[], Any], tmp_path: Path) -> None:
    models.save(tiny_model(), tmp_path / "model")

    def learned() -> Tensor:
        return learn(models.load(tmp_path / "model"), replace(FAST, steps=2)).concept.vectors

    with mode():
        there = learned()
    assert torch.equal(there.clone(), learned())


# --- economy


def test_images_are_encoded_once_and_the_encoder_leaves() -> None:
    model = Sum()
    learn(model)
    assert (model.encoded, model.released) == (3, True)
    learn(kept := Sum(), keep_encoder=True)
    assert (kept.encoded, kept.released) == (3, False)


def test_a_model_without_its_encoder_says_so() -> None:
    model = tiny_model()
    learn(model, replace(FAST, steps=1, batch_size=1))
    with pytest.raises(ModelError, match="released"):
        model.decode(torch.zeros(1, 4, 8, 8))


def test_the_text_transformer_runs_over_distinct_prompts() -> None:
    model = Sum()
    learn(model, replace(FAST, batch_size=16))
    assert max(model.prompts) == 3


def test_a_batch_shows_every_image_alike() -> None:
    model = Sum()
    training = Training(
        model, Concept.from_text(model, "<x>", "dog"), images(), TEMPLATES, replace(FAST, batch_size=7)
    )
    for step in range(5):
        shown = [
            next(i for i in range(3) if torch.equal(m, training.moments[i]))
            for m in training._batch(step).moments
        ]
        assert sorted(shown.count(i) for i in range(3)) == [2, 2, 3]


# --- resuming


def same(first: Result, second: Result) -> None:
    assert torch.equal(first.concept.vectors, second.concept.vectors)
    assert first.history == second.history
    for key in set(first.metrics) - {"seconds", "peak_memory_bytes"}:
        assert first.metrics[key] == second.metrics[key]


def test_a_seed_is_all_the_randomness() -> None:
    torch.manual_seed(0)
    first = learn(Sum())
    torch.manual_seed(1)
    same(first, learn(Sum()))
    other = learn(Sum(), replace(FAST, seed=1))
    assert not torch.equal(first.concept.vectors, other.concept.vectors)
    assert first.metrics["validation_loss_initial"] == other.metrics["validation_loss_initial"]


@pytest.mark.parametrize(("new", "last"), [(Sum, 1), (Sum, 3), (Sum, 11), (tiny_model, 5)])
def test_after_ctrl_c_it_resumes_bit_for_bit(tmp_path: Path, new: Callable[[], Any], last: int) -> None:
    whole = learn(new(), name="a dog", file=tmp_path / "whole.safetensors")
    file, seen = tmp_path / "x.safetensors", []

    def interrupt(report: StepReport) -> None:
        seen.append(report)
        if report.step == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(new(), file=file, on_step=interrupt)
    assert state_file(file).exists()
    assert file.exists() == (last >= FAST.validate_every)               # before, no vectors are better than the start
    again = learn(new(), name="a dog", file=file, resume=True, on_step=seen.append)
    same(whole, again)
    assert [report.step for report in seen] == list(range(1, 13))
    assert torch.equal(Concept.load(file).vectors, Concept.load(tmp_path / "whole.safetensors").vectors)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["first", "last"])
def test_ctrl_c_while_the_state_is_written(
    tmp_path: Path, when: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, at a checkpoint or at the end: what is written is written whole, and then it is passed on."""
    whole, file, save = learn(Sum()), tmp_path / "x.safetensors", torch.save
    writes: list[int] = []

    def interrupted(content: Any, path: Path) -> None:
        writes.append(content["state"]["step"])
        if writes[-1] == {"first": 5, "last": 12}[when] and writes.count(writes[-1]) == 1:
            signal.raise_signal(number)
        save(content, path)

    monkeypatch.setattr(torch, "save", interrupted)
    before = signal.signal(number, signal.default_int_handler)              # in the background it may be ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            learn(Sum(), replace(FAST, checkpoint_every=5), file=file)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors", "x.training.pt"]
    again = learn(Sum(), replace(FAST, checkpoint_every=5), file=file, resume=True)
    same(whole, again)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_ends_the_process_waits_too(number: signal.Signals) -> None:
    """SIGTERM does so where nothing is set, SIGINT as programs with windows set it."""
    code = (
        f"import signal; from inversion.interruption import unbroken; signal.signal({number:d}, signal.SIG_DFL)\n"
        f"with unbroken(): signal.raise_signal({number:d}); print('written', flush=True)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-number, "written\n")


def test_a_thread_that_no_signal_reaches_learns_and_writes_too(tmp_path: Path) -> None:
    """Python lets only the main one say what signals do."""
    results: list[Result] = []
    file = tmp_path / "x.safetensors"
    thread = threading.Thread(target=lambda: results.append(learn(Sum(), file=file)))
    thread.start()
    thread.join()
    same(results[0], learn(Sum()))
    assert torch.equal(Concept.load(file).vectors, results[0].concept.vectors)


def test_killed_within_a_step_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, model, file = learn(Sum()), Sum(), tmp_path / "x.safetensors"
    answer = model.predict

    def dying(*args: Any) -> Tensor:
        if model.calls == 12:
            raise RuntimeError("the light went out")
        return answer(*args)

    model.predict = dying
    with pytest.raises(RuntimeError, match="the light went out"):
        learn(model, file=file)
    same(whole, learn(Sum(), file=file, resume=True))


def test_killed_without_warning_it_resumes_from_the_checkpoint(tmp_path: Path) -> None:
    whole, model = learn(Sum()), Sum()
    concept = Concept.from_text(model, "<x>", "dog")
    training = Training(model, concept, images(), TEMPLATES, FAST)
    for report in training.steps():
        if report.step == 4:
            training.save(str(state_file(str(tmp_path / "x.safetensors"))))     # a path or a text
        if report.step == 6:
            break  # nothing after this reaches the disk
    same(whole, learn(Sum(), file=tmp_path / "x.safetensors", resume=True))


def test_checkpoints_are_written_on_the_way(tmp_path: Path) -> None:
    file, found = tmp_path / "x.safetensors", []
    learn(Sum(), file=file, on_step=lambda report: found.append(state_file(file).exists()))
    assert found == [False] * 3 + [True] * 9  # checkpoint_every=4
    assert sorted(f.name for f in tmp_path.iterdir()) == ["x.safetensors", "x.training.pt"]


def test_where_there_is_room_for_the_word_alone_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with full_disk(2000), pytest.raises(OSError, match=r"[Ff]ile .*x\.training\.pt"):
        learn(Sum(), replace(FAST, checkpoint_every=100), file=file)
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]
    assert torch.equal(Concept.load(file).vectors, learn(Sum()).concept.vectors)


def test_a_finished_training_can_be_resumed_and_does_nothing(tmp_path: Path) -> None:
    file, seen = tmp_path / "x.safetensors", []
    whole = learn(Sum(), file=file)
    same(whole, learn(Sum(), file=file, resume=True, on_step=seen.append))
    assert seen == []


@pytest.mark.parametrize(
    ("config", "init", "key"),
    [(replace(FAST, learning_rate=0.5), "dog", "learning_rate"), (FAST, "white dog", "initial vectors")],
)
def test_another_run_is_not_resumed(tmp_path: Path, config: TrainConfig, init: str, key: str) -> None:
    learn(Sum(), file=tmp_path / "x.safetensors")
    with pytest.raises(InversionError, match=f"its {key} is"):
        learn(Sum(), config, init, file=tmp_path / "x.safetensors", resume=True)


def test_another_word_is_another_run(tmp_path: Path) -> None:
    model, file = Sum(), tmp_path / "x.safetensors"
    learn(model, file=file)
    with pytest.raises(InversionError, match="its placeholder is <x>, not <y>"):
        train(model, Concept.from_text(model, "<y>", "dog"), images(), TEMPLATES, FAST, file=file, resume=True)


def test_other_images_are_another_run(tmp_path: Path) -> None:
    model, file = Sum(), tmp_path / "x.safetensors"
    learn(model, file=file)
    concept = Concept.from_text(model, "<x>", "dog")
    with pytest.raises(InversionError, match="its images is"):
        train(model, concept, images(seed=1), TEMPLATES, FAST, file=file, resume=True)


def test_other_templates_are_another_run(tmp_path: Path) -> None:
    model, file = Sum(), tmp_path / "x.safetensors"
    learn(model, file=file)
    concept, others = Concept.from_text(model, "<x>", "dog"), [["a photo of {}"]] * 3
    with pytest.raises(InversionError, match="its templates is"):
        train(model, concept, images(), others, FAST, file=file, resume=True)
    train(model, concept, images(), list(map(tuple, TEMPLATES)), FAST, file=file, resume=True)      # the same lines


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [("dtype", torch.bfloat16, "dtype"), ("schedule", {"name": "linear", "steps": 500}, "model")]
    + [("family", "product", "family")],
)
def test_a_model_run_in_another_way_is_another_run(tmp_path: Path, name: str, value: Any, key: str) -> None:
    file, other = tmp_path / "x.safetensors", Sum()
    learn(Sum(), file=file)
    setattr(other, name, value)
    with pytest.raises(InversionError, match=f"its {key} is"):
        learn(other, file=file, resume=True)


def test_another_model_is_another_run(tmp_path: Path) -> None:
    """Of the same words, as Stable Diffusion 1.4 and 1.5 are; another autoencoder, a LoRA merged into one layer."""
    file = tmp_path / "x.safetensors"
    learn(tiny_model(), file=file)
    for changed in (
        lambda model: model.unet.out[2].bias, lambda model: model.vae.quant_conv.weight,
        lambda model: model.unet.middle_block[1].transformer_blocks[0].attn2.to_k.weight,
        lambda model: model.text.final_layer_norm.weight,
    ):  # fmt: skip
        other = tiny_model()
        changed(other).mul_(2)
        with pytest.raises(InversionError, match="its model is"):
            learn(other, file=file, resume=True)
    with pytest.raises(InversionError, match="its model is"):
        learn(replace(tiny_model(), prediction="v_prediction"), file=file, resume=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_run_in_less_memory_is_the_same_run(tmp_path: Path, dtype: str) -> None:
    """Its weights wait in the file's dtype, elsewhere, and in another order."""
    models.save(tiny_model(), tmp_path / "model")
    file, small = tmp_path / "x.safetensors", {"offload": "stream", "checkpointing": "blocks"}
    for how, resume in (({}, False), (small, True), ({"offload": "idle"}, True)):
        model = models.load(tmp_path / "model", dtype=dtype, device="cpu", **how)
        learn(model, replace(FAST, steps=2), file=file, resume=resume)


def test_the_time_spent_adds_up_over_steps_and_runs(tmp_path: Path) -> None:
    model, spent, file = Sum(), [0.0], tmp_path / "x.training.pt"
    concept = Concept.from_text(model, "<x>", "dog")
    for resumed in (False, True):
        training = Training(model, concept, images(), TEMPLATES, FAST, keep_encoder=True)
        if resumed:
            training.resume(str(file))
        for report in training.steps():
            spent.append(training.state.seconds)
            if report.step == 6 and not resumed:
                break
        training.save(file)
    assert len(spent) == 13
    assert all(before < after for before, after in zip(spent, spent[1:]))


# --- the best, and stopping


def test_the_best_vectors_are_kept_not_the_last(tmp_path: Path) -> None:
    """At a learning rate that overshoots, the last vectors are not the best."""
    model = Sum()
    file = tmp_path / "x.safetensors"
    result = learn(model, replace(FAST, learning_rate=0.3, schedule="constant", steps=12), file=file)
    losses = [row["validation_loss"] for row in result.history]
    assert min(losses) < losses[-1]
    assert result.metrics["validation_loss_best"] == min(losses)
    assert result.metrics["best_step"] == result.history[losses.index(min(losses))]["step"]
    training = Training(model, Concept.from_text(model, "<x>", "dog"), images(), TEMPLATES, FAST)
    for concept in (result.concept, Concept.load(file)):
        assert training.validation.loss("<x>", concept) == min(losses)
        norm, cosine = concept.vectors.norm(), torch.cosine_similarity(concept.vectors, torch.tensor([START])).item()
        assert (concept.metadata["norms"], concept.metadata["cosines_to_init"]) == (f"{norm:.4f}", f"{cosine:.4f}")


def test_if_nothing_is_better_the_start_is_what_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    result = learn(Sum(), replace(FAST, learning_rate=50.0, schedule="constant"), file=file)
    assert torch.equal(Concept.load(file).vectors, result.concept.vectors)
    assert result.metrics["best_step"] == 0
    assert result.metrics["validation_loss_best"] == result.metrics["validation_loss_initial"]
    assert torch.equal(result.concept.vectors, torch.tensor([START]))


def test_patience_ends_a_training_that_stands_still() -> None:
    config = replace(FAST, steps=600, learning_rate=0.1, patience=3)
    result = learn(Sum(), config)
    assert result.metrics["steps"] < 600
    assert all(
        row["validation_loss"] > 0.999 * result.history[-4]["validation_loss"] for row in result.history[-3:]
    )
    assert learn(Sum(), replace(config, steps=60, patience=None)).metrics["steps"] == 60


# --- failing well


class Poisoned(Sum):
    """Answers nan at some calls of `predict`."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad = bad

    def predict(self, x_t: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        answer = super().predict(x_t, t, features)
        return answer * torch.nan if self.calls in self.bad else answer


def test_a_non_finite_step_is_passed_over_and_counted() -> None:
    model = Poisoned(
        {4, 5}
    )  # two calls validate the start (6 samples in batches of 4), so these are steps 2 and 3
    reports = []
    result = learn(model, on_step=reports.append)
    assert [report.step for report in reports if report.loss != report.loss] == [2, 3]
    assert result.metrics["skipped_steps"] == 2
    assert result.metrics["steps"] == 12
    assert result.concept.vectors.isfinite().all()
    assert result.history[1]["loss"] == reports[0].loss  # of steps 1 to 3 only the first counts


@pytest.mark.parametrize("slope", [float("inf"), 1e30])
def test_a_step_whose_gradient_is_not_finite_is_passed_over(slope: float) -> None:
    """Or has no finite norm: clipped, it would be nothing, and count as an update."""
    model = Sum()

    def steep(x_t: Tensor, t: Tensor, features: TextFeatures) -> Tensor:
        model.calls += 1
        s = features.context.sum((1, 2))[:, None, None, None]
        edge = 0
        if model.calls == 4:
            edge = (0 * s).sqrt() if math.isinf(slope) else slope * (s - s.detach())  # 0, of that slope
        return (s + edge).expand_as(x_t)

    model.predict = steep
    result = learn(model)
    assert result.metrics["skipped_steps"] == 1
    assert result.concept.vectors.isfinite().all()


def test_a_validation_loss_that_is_not_finite_is_none_and_never_the_best() -> None:
    result = learn(Poisoned({6, 7}))  # the two calls after the third step
    assert [row["validation_loss"] is None for row in result.history] == [False, True, False, False, False]
    assert result.metrics["validation_loss_best"] == result.history[-1]["validation_loss"]


def test_a_loss_that_stays_non_finite_stops_and_says_why(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(
        InversionError, match=r"not finite in 10 steps in a row, to step 14: lower the learning rate"
    ):
        learn(Poisoned(set(range(9, 1000))), replace(FAST, steps=100, validate_every=4), file=file)
    assert state_file(file).exists()
    assert Concept.load(file).metadata["steps"] == "4"  # the best until then


def test_a_loss_that_is_not_finite_now_and_then_stops_nothing() -> None:
    """Every second step: never two in a row, and more of them than end a training that has them in a row."""
    poisoned = Poisoned(set(range(4, 28, 2)))                           # two calls validate the start
    metrics = learn(poisoned, replace(FAST, steps=24, validate_every=24)).metrics
    assert (metrics["steps"], metrics["skipped_steps"]) == (24, 12)


def test_a_learning_rate_that_float32_cannot_hold(tmp_path: Path) -> None:
    """Such steps are passed over like a loss that is not finite."""
    result = learn(Sum(), replace(FAST, learning_rate=1e308, steps=3), file=tmp_path / "x.safetensors")
    assert (result.metrics["skipped_steps"], result.metrics["best_step"]) == (3, 0)
    with pytest.raises(InversionError, match=r"not finite in 10 steps in a row, to step 10: lower the learning rate"):
        learn(Sum(), replace(FAST, learning_rate=1e308, steps=30))


def test_a_loss_that_is_not_finite_from_the_start(tmp_path: Path) -> None:
    with pytest.raises(InversionError, match="not finite before the first step"):
        learn(Poisoned(set(range(1000))), file=tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


class Deaf(Sum):
    """Does not hear the last of the learned vectors."""

    def encode_text(self, tokens: Tokens, extra: Tensor | None = None) -> TextFeatures:
        return super().encode_text(tokens, None if extra is None else extra * self.heard(len(extra)))

    def heard(self, n: int | None) -> Tensor:
        return torch.tensor([[1.0]] * (n - 1) + [[0.0]])


@pytest.mark.parametrize(("n", "which"), [(1, "1"), (3, "3")])
def test_a_vector_that_never_moves_stops_the_training(n: int | None, which: str) -> None:
    with pytest.raises(
        InversionError, match=f"nothing was learned in 10 steps.*number {which} did not.*gradient is zero"
    ):
        learn(Deaf(), n=n)


def test_a_vector_of_which_a_number_never_moves_is_learned() -> None:
    """As where a text transformer's weights are zero."""
    model = Deaf()
    model.heard = lambda n: torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    moved = learn(model).concept.vectors != torch.tensor([START])
    assert moved.tolist() == [[True, True, True, False]]


def test_a_gradient_that_never_reaches_the_vectors() -> None:
    model = Sum()
    model.predict = lambda x_t, t, features: torch.zeros_like(x_t)
    with pytest.raises(InversionError, match="nothing was learned in 10 steps"):
        learn(model)


def test_a_learning_rate_too_small_to_move_anything() -> None:
    with pytest.raises(InversionError, match=r"nothing was learned.*learning rate is too small for float32"):
        learn(Sum(), replace(FAST, learning_rate=1e-12))


def test_a_short_training_is_checked_at_its_end() -> None:
    with pytest.raises(InversionError, match="nothing was learned in 2 steps"):
        learn(Deaf(), replace(FAST, steps=2))


# --- refusals before anything happens


def test_images_that_cannot_be_halved() -> None:
    model = tiny_model()
    with pytest.raises(ModelError, match="multiples of 4"):
        train(model, Concept.from_text(model, "<x>", "dog"), torch.zeros(3, 3, 18, 18), TEMPLATES, FAST)


@pytest.mark.parametrize(("count", "templates"), [(0, []), (2, TEMPLATES)])
def test_every_image_has_its_templates(count: int, templates: list[list[str]]) -> None:
    model = Sum()
    with pytest.raises(InversionError, match="N lists of templates"):
        train(model, Concept.from_text(model, "<x>", "dog"), torch.zeros(count, 3, 16, 16), templates, FAST)
    with pytest.raises(InversionError, match=r"are needed: got \(2, 3, 0, 0\)"):
        train(model, Concept.from_text(model, "<x>", "dog"), torch.zeros(2, 3, 0, 0), TEMPLATES[:2], FAST)


def test_each_concept_has_a_state_of_its_own() -> None:
    names = ["x.safetensors", "x.v1", "x.v2"]
    assert [state_file(Path(name)).name for name in names] == [
        "x.training.pt", "x.v1.training.pt", "x.v2.training.pt",
    ]  # fmt: skip


def test_vectors_of_another_width() -> None:
    with pytest.raises(InversionError, match="Stable Diffusion 1.*width 768;.*needs 4"):
        train(Sum(), Concept("<x>", torch.zeros(1, 768)), images(), TEMPLATES, FAST)


def test_the_concept_is_checked_against_the_templates() -> None:
    model = Sum()
    with pytest.raises(InversionError, match="more than the 22 that fit"):
        learn(model, n=23)
    assert model.encoded == 0


# --- what is told


def test_the_caption_s_loss_is_that_of_the_plain_words() -> None:
    """A word that starts as a copy of "cat" has, before it learns, the loss of "cat" as plain words."""
    as_words = learn(tiny_model(), name="cat").metrics["validation_loss_caption"]
    as_vectors = learn(tiny_model(), init="cat").metrics["validation_loss_initial"]
    assert as_words == pytest.approx(as_vectors, rel=1e-6)              # float32 sums of the same numbers
    assert as_words != pytest.approx(learn(tiny_model()).metrics["validation_loss_initial"], rel=1e-4)


def test_metrics_and_history() -> None:
    result = learn(Sum(), name="a white dog")
    metrics = result.metrics
    assert (metrics["steps"], metrics["skipped_steps"]) == (12, 0)
    assert metrics["seconds"] > 0
    assert metrics["peak_memory_bytes"] > 50e6  # torch alone is more
    assert learn(Sum()).metrics["validation_loss_caption"] is None
    assert [row["step"] for row in result.history] == [0, 3, 6, 9, 12]
    assert result.history[0]["cosines"] == [pytest.approx(1)]
    assert result.history[0]["loss"] is None
    assert -1 <= result.history[-1]["cosines"][0] < 1
    norms = [row["norms"][0] for row in result.history]
    assert len(set(norms)) == 5


def test_the_last_step_is_validated_wherever_it_falls() -> None:
    result = learn(Sum(), replace(FAST, steps=10, validate_every=4))
    assert [row["step"] for row in result.history] == [0, 4, 8, 10]


def test_reports_carry_losses_and_rates() -> None:
    reports = []
    result = learn(Sum(), on_step=reports.append)
    assert [report.step for report in reports if report.validation_loss is not None] == [3, 6, 9, 12]
    assert [report.learning_rate for report in reports] == [FAST.rate(k) for k in range(12)]
    assert result.history[-1]["loss"] == pytest.approx(sum(report.loss for report in reports[9:]) / 3)
    assert reports[-1].best_loss == result.metrics["validation_loss_best"]


def test_the_file_says_how_it_was_made(tmp_path: Path) -> None:
    learn(Sum(), replace(FAST, accumulation=2), init="white dog", file=tmp_path / "x.safetensors")
    metadata = Concept.load(tmp_path / "x.safetensors").metadata
    assert (metadata["family"], metadata["source"]) == ("sum", "a test")
    assert (metadata["init"], metadata["init_rule"]) == ("white dog", "one vector a token")
    assert len(metadata["norms"].split(", ")) == len(metadata["cosines_to_init"].split(", ")) == 2
    assert {"steps", "prediction", "learning_rate", "seed", "validation_loss", "images"} <= set(metadata)
    assert metadata["batch_size"] == "8"                                # two of 4 to a step


def test_images_out_of_range_are_refused() -> None:
    concept = Concept.from_text(tiny_model(), "<x>", "dog")
    wrong = (images() + 50, (images() * 100).to(torch.uint8), images()[:, :1], images() * float("nan"))
    for bad in wrong:
        with pytest.raises(InversionError, match=r"floats in \[-1, 1\] with 3 channels"):
            Training(tiny_model(), concept, bad, TEMPLATES, FAST)


def test_images_of_numbers_from_0_to_1_are_warned_of() -> None:
    model = tiny_model()
    concept, half = Concept.from_text(model, "<x>", "dog"), (images() + 1) / 2
    with pytest.warns(UserWarning, match=r"darker than middle grey.* in \[0, 1\], give 2 \* images - 1"):
        Training(model, concept, half, TEMPLATES, FAST, keep_encoder=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Training(model, concept, 2 * half - 1, TEMPLATES, FAST, keep_encoder=True)


def test_a_word_is_not_learned_for_a_file_named_as_a_pickle(tmp_path: Path) -> None:
    model = Sum()
    with pytest.raises(InversionError, match=r"x\.pt is named as a pickle.* call it x\.safetensors"):
        learn(model, file=tmp_path / "x.pt")
    assert model.encoded == 0


def test_resuming_what_was_never_written() -> None:
    concept = Concept.from_text(tiny_model(), "<x>", "dog")
    with pytest.raises(InversionError, match="nothing to resume"):
        train(tiny_model(), concept, images(), TEMPLATES, FAST, resume=True)


def test_a_training_that_was_stopped_for_not_moving_stops_again_when_resumed(tmp_path: Path) -> None:
    config = replace(FAST, steps=40, learning_rate=1e-12)
    for resume in (False, True):
        concept = Concept.from_text(tiny_model(), "<x>", "dog")
        with pytest.raises(InversionError, match="nothing was learned"):
            train(
                tiny_model(), concept, images(), TEMPLATES, config, file=tmp_path / "x.safetensors", resume=resume
            )
