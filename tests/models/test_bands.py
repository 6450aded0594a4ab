"""Maps in bands of rows: what the layers give one after the other, for bands of any height."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import bands, winograd
from models.layers import NormSiLU, Upsample, conv3x3, norm_conv, plus_conv, twice
from models.vae import VAE, VAEConfig
from tests.tiny import randomise

HEIGHT, WIDTH, CHANNELS = 13, 9, 32


def a_map(dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, CHANNELS, HEIGHT, WIDTH, generator=g, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def layers(dtype: torch.dtype = torch.float64, out: int = 16) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        both = nn.ModuleList([NormSiLU(8, CHANNELS, eps=1e-6), conv3x3(CHANNELS, out)])
        randomise(both)
    return tuple(both.to(dtype))


@pytest.fixture(params=[1, 8, 10, 13])
def banded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is large, in bands of so many rows of the map above, or of the multiple of four below that, and no
    gradient is wanted.
    """
    row = a_map().nbytes // HEIGHT
    monkeypatch.setattr(bands, "BAND_BYTES", request.param * row)
    monkeypatch.setattr(bands, "is_large", lambda x: True)
    with torch.no_grad():
        yield


# float64 rounds at 2e-16; each number is a sum of some 300
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.usefixtures("banded")
class TestBands:
    def test_a_norm_and_a_convolution(self) -> None:
        (norm, conv), x = layers(), a_map()
        wanted = F.conv2d(F.silu(F.group_norm(x, 8, norm.weight, norm.bias, 1e-6)), conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(norm_conv(norm, conv, x), wanted, **CLOSE)
        assert torch.equal(x, a_map())                                     # which only what is in place changes

    def test_in_place_of_what_it_reads(self) -> None:
        (norm, conv), x = layers(out=CHANNELS), a_map()
        wanted = norm_conv(norm, conv, x)
        assert norm_conv(norm, conv, x, in_place=True) is x
        assert torch.equal(x, wanted)

    def test_doubling_and_a_convolution(self) -> None:
        layer, x = Upsample(CHANNELS), a_map()
        randomise(layer.double())
        wanted = F.conv2d(twice(x), layer.conv.weight, layer.conv.bias, padding=1)
        torch.testing.assert_close(layer(x), wanted, **CLOSE)

    def test_a_shortcut(self) -> None:
        _, x = layers(), a_map()
        conv = type(conv3x3(1, 1))(CHANNELS, CHANNELS, 1).double().requires_grad_(False)
        wanted = x + F.conv2d(x, conv.weight, conv.bias)
        torch.testing.assert_close(plus_conv(x.clone(), conv, x), wanted, **CLOSE)

    def test_an_autoencoder(self) -> None:
        with torch.random.fork_rng([]):
            torch.manual_seed(2)
            vae = VAE(VAEConfig(3, 4, 32, (1, 2), 1))
            randomise(vae)
        vae, g = vae.double(), torch.Generator().manual_seed(3)
        latents = torch.randn(2, 4, 8, 6, generator=g, dtype=torch.float64)
        images = torch.randn(2, 3, 16, 12, generator=g, dtype=torch.float64)
        ours = vae.decode(latents), vae.encode(images)
        vae.requires_grad_(True)                                           # autograd's own operations, whole maps
        for a, b in zip(ours, (vae.decode(latents), vae.encode(images))):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)       # some twenty such layers

    @torch.enable_grad()
    def test_a_gradient_goes_through_whole_maps(self) -> None:
        (norm, conv), x = layers(), a_map().requires_grad_()
        (found,) = torch.autograd.grad(norm_conv(norm, conv, x).sum(), x)
        plain = F.conv2d(F.silu(F.group_norm(x, 8, norm.weight, norm.bias, 1e-6)), conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(found, torch.autograd.grad(plain.sum(), x)[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("out", [1, CHANNELS, 4 * CHANNELS])
def test_of_what_a_band_is_made_from_nothing_is_larger_either(out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the three channels of an image all rows made one band, for which the whole map was normed at once."""
    x, sizes, normed = a_map(), [], bands.normed
    monkeypatch.setattr(bands, "is_large", lambda x: True)
    monkeypatch.setattr(bands, "BAND_BYTES", 4 * max(1, out // CHANNELS) * x.nbytes // HEIGHT)
    monkeypatch.setattr(bands, "normed", lambda x, *rest: sizes.append(x.shape[2]) or normed(x, *rest))
    norm_conv(*layers(out=out), x)
    assert sizes == [5, 6, 6, 2]                                # four rows each, and those beside them


@torch.no_grad()
@pytest.mark.parametrize(("rows", "tiled"), [(4, 12), (6, 12), (8, 8)])
def test_winograds_convolution_in_bands(rows: int, tiled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32; thirteen rows leave one that is no tile, or five, for a plain convolution."""
    x = a_map(torch.float32)[..., :8]
    monkeypatch.setattr(bands, "is_large", lambda x: True)
    monkeypatch.setattr(bands, "BAND_BYTES", rows * x.nbytes // HEIGHT)
    for least in ("PIXELS", "CHANNELS"):
        monkeypatch.setattr(winograd, least, 1)
    made, convolved = [], winograd.convolved
    monkeypatch.setattr(winograd, "convolved", lambda *a, **k: made.append(convolved(*a, **k)) or made[-1])
    norm, conv = layers(torch.float32, CHANNELS)
    wanted = F.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double(), 1e-6)
    wanted = F.conv2d(F.silu(wanted), conv.weight.double(), conv.bias.double(), padding=1)
    found = norm_conv(norm, conv, x)
    # sums of 288 products of 0.5 and 1, which float32 rounds to 6e-8 each, ten times as much where Winograd adds
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)
    assert sum(part.shape[2] for part in made) == tiled
    assert torch.equal(norm_conv(norm, conv, x, in_place=True), found)


@torch.no_grad()
def test_in_bfloat16_the_kernels_of_a_doubling_are_summed_before_they_are_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bands, "is_large", lambda x: True)
    layer, x = Upsample(CHANNELS), a_map(torch.bfloat16)
    randomise(layer.bfloat16())
    exact = F.conv2d(twice(x).double(), layer.conv.weight.double(), layer.conv.bias.double(), padding=1)
    # a rounding of bfloat16 is 2^-9 of the number, and that of a weight of its product; both are of order one, and the
    # largest of thirty thousand sums of them was seen at 0.011
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-8, atol=2**-6)


@torch.no_grad()
def test_in_bfloat16_a_sum_of_the_kernel_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single one on the map gives back the sums; of four numbers of bfloat16 float32 holds them."""
    monkeypatch.setattr(bands, "is_large", lambda x: True)
    layer, x = Upsample(CHANNELS), torch.zeros(1, CHANNELS, 5, 4).bfloat16()
    randomise(layer.bfloat16())
    layer.conv.bias.zero_()
    x[0, 3, 2, 1] = 1
    exact = F.conv2d(twice(x).double(), layer.conv.weight.double(), padding=1)
    assert torch.equal(layer(x), exact.bfloat16())


def test_small_maps_stay_whole() -> None:
    assert not bands.is_large(torch.empty(2, 960, 64, 64, dtype=torch.bfloat16))
    assert bands.is_large(torch.empty(1, 256, 256, 256, dtype=torch.bfloat16))
    assert not bands.is_large(torch.empty(1, 256, 256, 256, dtype=torch.bfloat16, device="meta"))      # no CPU's
