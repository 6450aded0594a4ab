"""The residual block of a UNet, told the time, which may resample; and the convolution that halves in its place."""

from collections.abc import Callable

from torch import Tensor, nn

from models.condition import Condition
from models.layers import (
    Conv2d,
    NormSiLU,
    conv3x3,
    conv_of_doubled,
    conv_plus,
    for_each,
    fresh,
    plus,
    plus_conv,
    twice,
    zero,
)  # fmt: skip


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the time enters in between. (B, C_in, h, w) -> (B, C_out, h, w).

    scale_shift: the time scales and shifts the second norm, h * (1 + scale) + shift (FiLM), instead of being added
    before it. resample: `twice` or `half`, applied to both branches before their first convolution. (The norms here
    end in SiLU: where the published names have it, and a dropout, there is nothing, unless somebody puts it there.)
    """

    reads = ("emb",)

    def __init__(
        self, c_in: int, c_out: int, emb_dim: int, groups: int, scale_shift: bool = False,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample or nn.Identity()
        self.in_layers = nn.Sequential(NormSiLU(groups, c_in, eps=1e-5), nn.Identity(), conv3x3(c_in, c_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, 2 * c_out if scale_shift else c_out))
        self.out_layers = nn.Sequential(
            NormSiLU(groups, c_out, eps=1e-5), nn.Identity(), nn.Identity(), zero(conv3x3(c_out, c_out))
        )
        self.skip_connection = nn.Identity() if c_in == c_out else Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        def before_the_last(x: Tensor, emb: Tensor) -> Tensor:
            h, emb = first_gap(first_norm(x)), self.emb_layers(emb)[:, :, None, None]          # (b, C_out (· 2), 1, 1)
            doubles = self.resample is twice
            if not (doubles or self.scale_shift):
                return dropout(gap(norm(conv_plus(first_conv, self.resample(h), emb))))
            h = conv_of_doubled(first_conv, h) if doubles else fresh(first_conv, self.resample(h))
            emb = for_each(emb, h)                                                             # (B, C_out (· 2), 1, 1)
            h = norm(h, *emb.chunk(2, dim=1)) if self.scale_shift else norm(plus(h, emb))
            return dropout(gap(h))

        first_norm, first_gap, first_conv = self.in_layers
        norm, gap, dropout, conv = self.out_layers
        h = fresh(conv, cond.run("blocks", self, before_the_last, x, cond.emb))
        if type(self.skip_connection) is Conv2d:
            return plus_conv(h, self.skip_connection, self.resample(x))
        return plus(h, self.skip_connection(self.resample(x)))


class Downsample(nn.Module):
    """A convolution of stride two. (B, C, h, w) -> (B, C, h/2, w/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = conv3x3(channels, channels, stride=2)

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        return self.op(x)
