"""Networks that wait in host memory give the same numbers as those that do not, and take no more room than promised."""

import copy
import itertools
import pickle
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models import ModelError, streaming
from models.copying import PLACES, CopyAtOnce, CopyBeside, extent
from models.first_run import seen, unchanged
from models.lending import computing_with, parameters_of
from models.mapped import Mapped
from models.setting import Setting, place
from models.streaming import Window
from tests.tiny import tiny_classes, tiny_glide, tiny_model

CPU = torch.device("cpu")
IDLE, STREAM = Setting(torch.float32, offload="idle"), Setting(torch.float32, "blocks", offload="stream")
STREAMED = {"offload": "stream", "checkpointing": "blocks"}


@pytest.fixture(scope="module", params=["latent", "glide"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on the disk."""
    folder, latent = tmp_path_factory.mktemp("model"), request.param == "latent"
    path = folder / ("model" if latent else "model.safetensors")
    models.save(tiny_model() if latent else tiny_glide(), path)
    return path


def predicted(model: Any) -> tuple[Tensor, Tensor]:
    """What a model predicts for prompts with a learned word, and the word's vectors."""
    noise = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, model.width, generator=noise).requires_grad_()
    features = model.encode_text(model.tokenizer.encode(["a photo of <x>", "a dog"], {"<x>": 2}), vectors)
    x_t = torch.randn(2, *model.x0_shape(16, 16), generator=noise)
    return model.predict(x_t, torch.tensor([3, 500]), features), vectors


def step(model: Any) -> tuple[Tensor, Tensor]:
    """The prediction, and its gradient."""
    out, vectors = predicted(model)
    return out, torch.autograd.grad(out.square().mean(), vectors)[0]


class Watched(CopyAtOnce):
    """Notes which layers are copied where."""

    def __init__(self, places: int) -> None:
        super().__init__(places)
        self.seen: list[tuple[int, int]] = []

    def begin(self, place: int, host: Iterable[Tensor], device: Sequence[Tensor]) -> None:
        host = list(host)
        super().begin(place, host, device)
        self.seen.append((place, host[0].data_ptr()))


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert all(map(torch.equal, found, wanted))
    assert all(x.abs().max() > 1e-3 for x in wanted)


# --- the numbers


@pytest.mark.parametrize("how", [{"offload": "idle"}, {"offload": "idle", "checkpointing": "blocks"}, STREAMED])
def test_values_and_gradients_are_those_of_the_model_in_place(path: Path, how: dict[str, Any]) -> None:
    for dtype in ("float32", "bfloat16"):              # the file is in float32: the second is cast on the way
        wanted = models.load(path, dtype, "cpu", checkpointing=how.get("checkpointing", "none"))
        found = models.load(path, dtype, "cpu", **how)
        assert (found.dtype, found.setting.offload) == (wanted.dtype, how["offload"])
        for _ in range(2):                             # the second time the window holds what the first has left
            same(step(found), step(wanted))


@pytest.mark.parametrize("how", [{"offload": "idle"}, STREAMED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_converted_on_the_way_give_the_same_bits(
    tmp_path: Path, how: dict[str, Any], dtype: str
) -> None:
    models.save(tiny_model(), tmp_path / "half", dtype=torch.float16)
    wanted = models.load(tmp_path / "half", dtype, "cpu", checkpointing=how.get("checkpointing", "none"))
    same(step(models.load(tmp_path / "half", dtype, "cpu", **how)), step(wanted))


def test_a_copy_that_was_interrupted_is_made_anew() -> None:
    class Interrupted(CopyAtOnce):
        """The fourth copy, over layer 1, ends after its first tensor."""

        calls = 0

        def begin(self, place: int, host: Iterable[Tensor], device: Sequence[Tensor]) -> None:
            self.calls += 1
            if self.calls == 4:
                super().begin(place, host, device[:1])
                raise KeyboardInterrupt
            super().begin(place, host, device)

    model, wanted = tiny_model(), tiny_model()
    place(model, STREAM, CPU, Interrupted(PLACES))
    with pytest.raises(KeyboardInterrupt):
        step(model)
    wanted.checkpointing = "blocks"
    same(step(model), step(wanted))


@pytest.mark.parametrize("places", [1, PLACES])
def test_a_copy_that_failed_beside_is_made_anew(places: int) -> None:
    class Failing(CopyAtOnce):
        """Begins every copy, and finds only when it is waited for that the third came to nothing."""

        begun = 0

        def begin(self, place: int, host: Iterable[Tensor], device: Sequence[Tensor]) -> bool:
            self.begun += 1
            if self.begun != 3:
                super().begin(place, host, device)
            return self.begun == 3

        def wait(self, ticket: bool) -> None:
            if ticket:
                raise OSError("the disk is gone")

    layers = [torch.nn.Linear(3, 2 + i) for i in range(4)]
    window = Window(layers, CPU, torch.float64, Failing(places))
    for i in (0, 1):
        window.take(i)
    with pytest.raises(OSError, match="the disk is gone"):
        window.take(2)
    assert all(torch.equal(w, p.double()) for w, p in zip(window.take(2), parameters_of(layers[2])))


def test_images_are_encoded_and_decoded_by_a_visitor() -> None:
    wanted, found = tiny_model(), tiny_model()
    place(found, IDLE, CPU)
    images = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    same((found.moments(images), found.decode(images[:, :, :4, :4].repeat(1, 2, 1, 1)[:, :4])),
         (wanted.moments(images), wanted.decode(images[:, :, :4, :4].repeat(1, 2, 1, 1)[:, :4])))  # fmt: skip
    found.release_encoder()
    with pytest.raises(ModelError, match="released"):
        found.moments(images)


def test_what_no_layer_holds_goes_to_the_device() -> None:
    """Where the dtype is the same, too; the layers' weights wait where they are."""
    model = tiny_model()
    waiting = {id(p) for layer in model.unet.layers() for p in parameters_of(layer)}
    place(model, STREAM, torch.device("meta"))
    found = {(id(p) in waiting, p.device.type) for p in model.unet.parameters()}
    assert found == {(True, "cpu"), (False, "meta")}


def test_an_upsampler_waits_as_its_base_does() -> None:
    base, wanted = tiny_glide(), tiny_glide(factor=2)
    base.upsampler = tiny_glide(factor=2)
    place(base, STREAM, CPU)
    features = wanted.encode_text(wanted.tokenizer.encode(["a dog"]))
    x, small, t = torch.ones(1, 3, 32, 32), torch.zeros(1, 3, 16, 16), torch.tensor([7])
    first, second = (m.given((32, 32), small, None, None).predict(x, t, features) for m in (base.upsampler, wanted))
    assert base.upsampler.window is not None
    # a copied weight may lie otherwise in memory, and two threads then add in another order: float32's 6e-8, grown
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


# --- the room


def test_the_window_holds_two_layers_and_each_is_copied_when_its_turn_comes() -> None:
    model, copier = tiny_model(), Watched(PLACES)
    layers = model.unet.layers()
    place(model, STREAM, CPU, copier)
    order = [parameters_of(layer)[0].data_ptr() for layer in layers]
    step(model)
    # up: every layer once. Down: the last two are still there; the first two need no gradient, they come before
    # the first reading of the text, but the second is fetched ahead of a turn that does not come
    down = [order.index(pointer) for _, pointer in copier.seen[len(order) :]]
    assert [pointer for _, pointer in copier.seen[: len(order)]] == order
    assert down == list(range(len(order) - 3, 0, -1))
    for way in (copier.seen[: len(order)], copier.seen[len(order) :]):
        assert all(first[0] != second[0] for first, second in zip(way, way[1:]))               # places take turns
    assert len(model.window.places) == PLACES == 2
    assert {len(held) for held in model.window.places} == {max(extent(parameters_of(layer)) for layer in layers)}


def test_where_nothing_is_fetched_ahead_the_window_holds_one_layer(path: Path) -> None:
    model, copier = tiny_model(), Watched(1)
    place(model, STREAM, CPU, copier)
    order = [parameters_of(layer)[0].data_ptr() for layer in model.unet.layers()]
    step(model)
    # up: every layer once. Down: the last is still there; the first two come before the first reading of the text
    copied = [order.index(pointer) for _, pointer in copier.seen]
    assert copied == [*range(len(order)), *range(len(order) - 2, 1, -1)]
    loaded = models.load(path, "bfloat16", "cpu", **STREAMED)
    largest = max(extent(parameters_of(layer)) for layer in loaded.unet.layers())
    assert [len(held) for held in loaded.window.places] == [largest]


def test_what_forward_keeps_is_no_weight() -> None:
    """A weight that were kept for the gradient would by then be the next layer's."""
    for how, expected in ((STREAM, False), (None, True)):
        model, kept = tiny_model(), []
        if how:
            place(model, how, CPU, CopyAtOnce())
        weights = model.window.places if how else list(model.unet.parameters())
        theirs = {w.untyped_storage().data_ptr() for w in weights}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            predicted(model)
        assert kept
        assert any(x.untyped_storage().data_ptr() in theirs for x in kept) == expected


def test_a_visitor_s_weights_are_not_kept() -> None:
    """Of the text transformer the graph holds the ids and the word's vectors until it comes again."""
    model, kept = tiny_model(), []
    place(model, IDLE, CPU)
    vectors = torch.ones(2, model.width).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model.encode_text(model.tokenizer.encode(["a photo of <x>"], {"<x>": 2}), vectors)
    assert [x.shape for x in kept] == [(1, model.tokenizer.length), (2, model.width)]


def test_weights_stay_the_map_of_their_file(path: Path) -> None:
    model = models.load(path, "bfloat16", "cpu", **STREAMED)
    before = {name: p.data_ptr() for layer in model.unet.layers() for name, p in layer.named_parameters()}
    step(model)
    after = {name: p.data_ptr() for layer in model.unet.layers() for name, p in layer.named_parameters()}
    assert before == after
    mapped = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()
              if str(path) in line]  # fmt: skip
    ranges = [range(int(first, 16), int(last, 16)) for first, last in mapped]
    for layer in model.unet.layers():
        for p in parameters_of(layer):
            assert p.dtype == torch.float32
            assert any(p.data_ptr() in r for r in ranges)
    assert next(model.unet.parameters()).dtype == torch.bfloat16          # what is no layer's is on the device


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", ["idle", "stream"])
def test_on_a_cpu_all_that_waits_is_read_in_maps_that_go(
    path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, offload: str
) -> None:
    """What such a map holds is all that counts: if it held twice the numbers, so would the model."""
    found = models.load(path, dtype, "cpu", checkpointing="blocks", offload=offload)
    monkeypatch.setattr(Mapped, "anew", lambda self: 2 * self.weight)
    wanted = models.load(path, dtype, "cpu", checkpointing="blocks")
    for part in (wanted.text, *(wanted.unet.layers() if offload == "stream" else ())):
        for p in parameters_of(part):
            p.data = p.data * 2
    same(step(found), step(wanted))


def test_what_is_converted_when_the_rest_is_made_to_wait_is_read_so_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mapped, "anew", lambda self: 2 * self.weight)
    for how in ({"offload": "idle"}, STREAMED):
        wanted, found = models.load(path, "bfloat16", "cpu"), models.load(path, "bfloat16", "cpu", **how)
        waits = {id(p) for layer in found.unet.layers() for p in parameters_of(layer) if how == STREAMED}
        stays = [(p, q) for p, q in zip(parameters_of(found.unet), parameters_of(wanted.unet)) if id(p) not in waits]
        assert stays
        assert all(torch.equal(p, 2 * q) for p, q in stays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", ["idle", "stream"])
def test_weights_that_were_changed_are_not_read_from_the_file(path: Path, dtype: str, offload: str) -> None:
    """In place, by another model's state, or replaced."""

    def changed(model: Any, change: Any) -> None:
        with torch.no_grad():
            for part in (model.text, *model.unet.layers()):
                change(part)

    def doubled(part: torch.nn.Module) -> None:
        for p in parameters_of(part):
            p.mul_(2)

    def loaded(part: torch.nn.Module) -> None:
        part.load_state_dict({name: 2 * p for name, p in part.state_dict().items()})

    def replaced(part: torch.nn.Module) -> None:
        for p in parameters_of(part):
            p.data = 2 * p.data

    for change in (doubled, loaded, replaced):
        both = (models.load(path, dtype, "cpu", checkpointing="blocks", offload=how) for how in ("none", offload))
        wanted, found = both
        before = step(wanted)
        for model in (wanted, found):
            changed(model, change)
        assert not torch.equal(step(wanted)[0], before[0])
        same(step(found), step(wanted))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", ["doubled", "replaced", "another"])
def test_a_streamed_layer_that_was_read_before_is_changed(path: Path, dtype: str, change: str) -> None:
    """In bfloat16 one layer still lies in its place."""
    wanted = models.load(path, dtype, "cpu", checkpointing="blocks")
    found = models.load(path, dtype, "cpu", **STREAMED)
    same(step(found), step(wanted))
    for model in (wanted, found):
        for layer in model.unet.layers():
            if change == "another":
                layer.load_state_dict({name: 2 * p for name, p in layer.state_dict().items()}, assign=True)
                continue
            for p in parameters_of(layer):
                with torch.no_grad():
                    p.mul_(2) if change == "doubled" else setattr(p, "data", 2 * p.data)
    same(step(found), step(wanted))


class Added(torch.nn.Module):
    """A convolution and something beside it, as a LoRA's. Its weight comes before those that it wraps."""

    def __init__(self, conv: torch.nn.Module) -> None:
        super().__init__()
        self.conv, self.own = conv, torch.nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.own


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_layers_may_get_more_weights(path: Path, dtype: str) -> None:
    wanted = models.load(path, dtype, "cpu", checkpointing="blocks")
    found = models.load(path, dtype, "cpu", **STREAMED)
    before = step(found)
    for model in (wanted, found):
        for layer in model.unet.layers():
            for name, conv in list(layer.named_children()):
                if isinstance(conv, torch.nn.Conv2d):
                    setattr(layer, name, Added(conv))
    wanted.unet.to(wanted.dtype)
    same(step(found), step(wanted))
    assert not torch.equal(step(found)[0], before[0])


@pytest.mark.parametrize("beside", [False, True])
def test_a_layer_that_lies_in_its_place_may_get_more_weights_than_fit(
    monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    if beside:
        as_if_cuda(monkeypatch)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4)).requires_grad_(False)
    copier = CopyBeside(extent(layer.parameters()), torch.float64, CPU) if beside else CopyAtOnce()
    window = Window([layer], CPU, torch.float64, copier)
    for more in (torch.nn.Linear(4, 2), torch.nn.Linear(2, 500)):
        first = seen(layer)
        window.take(0)
        layer.append(more.requires_grad_(False))
        assert not unchanged(first, layer)
        with torch.inference_mode():                        # a place that grows there is for others, too
            assert [w.tolist() for w in window.take(0)] == [p.tolist() for p in layer.parameters()]
        layer[0].weight.data = 2 * layer[0].weight.data
        assert [w.tolist() for w in window.take(0)] == [p.tolist() for p in layer.parameters()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("replaced", ["parameter", "data"])
def test_a_weight_may_take_the_place_of_one_that_took_another_s(path: Path, dtype: str, replaced: str) -> None:
    """It may get the address of the first, which is gone by then."""
    def put(model: Any, seed: int) -> None:
        conv, g = model.unet.layers()[0], torch.Generator().manual_seed(seed)
        new = 0.1 * torch.randn(conv.weight.shape, generator=g)
        if replaced == "data":
            conv.weight.data = new
        else:
            conv.weight = torch.nn.Parameter(new, requires_grad=False)

    found = models.load(path, dtype, "cpu", **STREAMED)
    for k in range(10):
        wanted = models.load(path, dtype, "cpu", **STREAMED)
        put(wanted, k)
        put(found, k + 1)
        put(found, k)
        assert all(map(torch.equal, step(found), step(wanted)))


def test_a_streamed_layer_is_not_trained_and_not_changed_before_its_gradient(path: Path) -> None:
    model = models.load(path, "float32", "cpu", **STREAMED)
    for network in (model.unet.layers()[-1], model.text):
        out, _ = predicted(model)
        parameters_of(network)[-1].mul_(2)
        with pytest.raises(RuntimeError, match="weights were changed, .* between a forward and its backward pass"):
            out.sum().backward()
    model.unet.layers()[0].bias.requires_grad_()                       # one weight of one layer is enough
    with pytest.raises(ModelError, match="get no gradient: load it without offload"):
        predicted(model)
    with torch.no_grad():
        predicted(model)


@pytest.mark.parametrize("how", [{"offload": "idle"}, STREAMED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_take_turns(path: Path, how: dict[str, Any], dtype: str) -> None:
    model = models.load(path, dtype, "cpu", **how)
    own = [*parameters_of(model.unet), *parameters_of(model.text)]
    wanted = step(model)
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(step, model) for _ in range(16)]
    for each in found:
        same(each.result(), wanted)
    assert all(x is y for x, y in zip(own, [*parameters_of(model.unet), *parameters_of(model.text)]))


def test_saving_takes_its_turn(path: Path, tmp_path: Path) -> None:
    model, saved = models.load(path, "float32", "cpu", **STREAMED), tmp_path / path.name
    layer, inside, go_on = model.unet.layers()[0], threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        inside.set()
        go_on.wait(10)

    layer.register_forward_pre_hook(hold)
    with ThreadPoolExecutor(2) as threads:
        computes = threads.submit(predicted, model)
        assert inside.wait(10)
        saves = threads.submit(models.save, model, saved)
        wait([saves], timeout=0.2)                       # it would have been through in a tenth of that
        assert not saves.done()
        go_on.set()
        computes.result()
        saves.result()
    same(step(models.load(saved, device="cpu")), step(models.load(path, device="cpu")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(path: Path, dtype: str, copied: Any) -> None:
    """It reads no file, which it may not be alike."""
    model = models.load(path, dtype, "cpu", **STREAMED)
    for p in parameters_of(model.unet):
        p.mul_(1.25)
    wanted, other = step(model), copied(model)
    for p in parameters_of(model.unet):
        p.mul_(2)
    same(step(other), wanted)


@pytest.mark.parametrize("how", [{"offload": "idle"}, STREAMED])
def test_each_network_runs_in_its_own_dtype(tmp_path: Path, how: dict[str, Any]) -> None:
    """If none is asked for; the upsampler, too."""
    model, glide, larger = tiny_model(), tiny_glide(), tiny_glide(factor=2)
    model.unet.bfloat16()
    larger.unet.bfloat16()
    models.save(model, tmp_path / "latent")
    models.save(glide, tmp_path / "base.safetensors")
    models.save(larger, tmp_path / "upsample.safetensors")
    images = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    for dtype in (None, "float32"):
        wanted, found = (
            models.load(tmp_path / "latent", dtype, "cpu", **each)
            for each in ({"checkpointing": how.get("checkpointing", "none")}, how)
        )
        same(step(found), step(wanted))
        same((found.moments(images),), (wanted.moments(images),))
        context = found.encode_text(found.tokenizer.encode(["a dog"])).context
        assert (context.dtype, found.dtype) == (torch.float32, wanted.dtype)
    cascade = models.load(tmp_path, None, "cpu", **how)
    assert (cascade.dtype, cascade.upsampler.dtype) == (torch.float32, torch.bfloat16)
    assert cascade.upsampler.encode_text(cascade.tokenizer.encode(["a dog"])).context.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_were_loaded_for_inference(path: Path, dtype: str) -> None:
    """They count no changes."""
    with torch.inference_mode():
        wanted, found = models.load(path, dtype, "cpu"), models.load(path, dtype, "cpu", **STREAMED)
    for where in (torch.inference_mode, torch.inference_mode, torch.no_grad):
        with where():
            assert torch.equal(predicted(found)[0], predicted(wanted)[0])


def test_a_layer_that_is_put_into_a_streamed_network_is_an_error(path: Path) -> None:
    model = models.load(path, "float32", "cpu", **STREAMED)
    model.unet.middle_block[1] = copy.deepcopy(model.unet.middle_block[1])
    with pytest.raises(ModelError, match="was put into a network that is streamed"):
        predicted(model)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize(("dtype", "tied"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_text_weights_that_are_trained_get_their_gradient(path: Path, dtype: str, learns: bool, tied: bool) -> None:
    gradients = []
    for offload in ("none", "idle"):
        model = models.load(path, dtype, "cpu", offload=offload)
        model.text.requires_grad_()
        if tied:
            first, second = [part for part in model.text.modules() if type(part) is torch.nn.LayerNorm][:2]
            second.weight = first.weight
        extra = torch.zeros(1, model.width).requires_grad_() if learns else None
        features = model.encode_text(model.tokenizer.encode(["a <x>" if learns else "a dog"], {"<x>": 1}), extra)
        features[0].float().square().mean().backward()
        gradients.append([p.grad.to(torch.float32) for p in parameters_of(model.text) if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    # the second's weights, and so its gradients, are float32 and only computed with in bfloat16: equal all the same
    assert all(map(torch.equal, *gradients))


def test_on_a_cpu_there_is_no_place_where_nothing_is_converted(path: Path) -> None:
    for dtype, empty in (("float32", True), ("bfloat16", False)):
        model = models.load(path, dtype, "cpu", **STREAMED)
        assert [len(held) == 0 for held in model.window.places] == [empty]


def test_a_layer_that_fails_gets_its_own_weights_back() -> None:
    layer = torch.nn.Linear(2, 2)
    own = parameters_of(layer)
    with computing_with(layer, [torch.zeros(2, 2), torch.zeros(2)]):
        assert not layer(torch.ones(2)).any()
    with pytest.raises(RuntimeError, match="shapes"), computing_with(layer, [torch.zeros(2, 2), torch.zeros(2)]):
        layer(torch.ones(3, 3))
    assert all(x is y for x, y in zip(parameters_of(layer), own))


def test_a_model_that_waits_is_saved_in_what_it_runs_in(path: Path, tmp_path: Path) -> None:
    for how, dtype in itertools.product(({"offload": "idle"}, STREAMED), ("float32", "bfloat16")):
        for name, each in (("found", how), ("wanted", {})):
            models.save(models.load(path, dtype, "cpu", **each), tmp_path / dtype / name / path.name)
        found, wanted = (models.load(tmp_path / dtype / name / path.name, device="cpu") for name in ("found", "wanted"))
        for network in ("unet", "text"):
            pairs = zip(parameters_of(getattr(found, network)), parameters_of(getattr(wanted, network)))
            assert all(p.dtype == q.dtype and torch.equal(p, q) for p, q in pairs)
        same(step(found), step(wanted))


@pytest.mark.parametrize("offload", ["idle", "stream"])
def test_a_token_s_vector_is_that_of_the_table_that_is_used(path: Path, offload: str) -> None:
    found, wanted = (models.load(path, "bfloat16", "cpu", checkpointing="blocks", offload=o) for o in (offload, "none"))
    assert torch.equal(found.embedding(5), wanted.embedding(5))


# --- CUDA's copies, without a GPU: what is ordered in which order


class Order:
    """Stands for torch.cuda: streams and events that note what is asked of them."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def Stream(self, device: torch.device) -> "Order.Queue":  # noqa: N802
        return Order.Queue(self, "copies")

    def current_stream(self, device: torch.device) -> "Order.Queue":
        return Order.Queue(self, "computes")

    def stream(self, queue: "Order.Queue") -> nullcontext:
        return nullcontext()

    class Queue:
        def __init__(self, order: "Order", name: str) -> None:
            self.order, self.name = order, name

        def record_event(self) -> "Order.Queue":
            return self

        def wait_event(self, event: "Order.Queue") -> None:
            self.order.said.append(f"{self.name} waits for {event.name}")

        def synchronize(self) -> None:
            self.order.said.append(f"the host waits for {self.name}")


def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> Order:
    """Until the test ends nothing is pinned, and what is asked of torch.cuda is noted."""
    order, empty = Order(), torch.empty
    monkeypatch.setattr(streaming.torch, "cuda", order)
    monkeypatch.setattr(streaming.torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more))
    return order


def test_cuda_copies_wait_for_what_still_reads_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    order, layers = as_if_cuda(monkeypatch), [torch.nn.Linear(3, 2 + i) for i in range(4)]
    size, cpu = max(extent(parameters_of(layer)) for layer in layers), torch.device("cpu")
    window = Window(layers, cpu, torch.float64, CopyBeside(size, torch.float64, cpu))
    for i in (0, 1, 2, 3, 3, 2, 1, 0):
        weights = window.take(i)
        window.copier.thread.submit(int).result()                     # the copy ahead has been ordered, too
        assert all(torch.equal(w, p.double()) for w, p in zip(weights, parameters_of(layers[i])))
    copies = [line for line in order.said if line != "computes waits for copies"]
    assert copies[:2] == ["copies waits for computes"] * 2            # into places that nobody has pinned before
    assert copies[2:] == ["the host waits for copies", "copies waits for computes"] * 4
    assert order.said.count("computes waits for copies") == 8         # before each layer
    other = copy.deepcopy(window)                                     # with a thread and pinned memory of its own
    assert all(torch.equal(w, p.double()) for w, p in zip(other.take(2), parameters_of(other.layers[2])))
    assert other.copier.thread is not window.copier.thread
    assert copy.copy(window) is window                # what shares its places has to know what lies there


# --- what is refused


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ModelError, match="it needs checkpointing blocks, not attention"):
        Setting(torch.float32, "attention", "auto", "stream")
    with pytest.raises(ModelError, match="offload is one of none, idle, stream; 'all' is none of them"):
        models.load("no/such/model", device="cpu", offload="all")            # before anything is read, or fetched
    with pytest.raises(ModelError, match="checkpointing is one of none, attention, blocks; 'all' is none of them"):
        Setting(torch.float32, checkpointing="all")
    with pytest.raises(ModelError, match="attention is one of auto, sliced, fused, mixed; 'flash' is none of them"):
        Setting(torch.float32, attention="flash")
    with pytest.raises(ModelError, match="dtype is one of torch's, such as torch.float32, not 'float32'"):
        Setting("float32")


@pytest.mark.parametrize("make", [tiny_model, tiny_glide, tiny_classes])
def test_a_model_with_places_is_not_moved(make: Callable[[], Any]) -> None:
    model = make()
    place(model, IDLE, CPU)
    with pytest.raises(ModelError, match="was loaded with offload idle for cpu: load it anew"):
        model.to("cpu")


def test_what_is_cheaper_comes_in_order() -> None:
    setting, steps = Setting(torch.float16), []
    while setting := setting.cheaper():
        steps.append((setting.checkpointing, setting.offload))
    assert steps == [("attention", "none"), ("blocks", "none"), ("blocks", "idle"), ("blocks", "stream")]
