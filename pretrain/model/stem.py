"""From pixels to patch tokens: one linear map, or a few strided convolutions.

Convolutions at the bottom make a small transformer learn from far fewer pictures than a linear map
of whole patches does (Xiao et al. 2021, "Early Convolutions Help Transformers See Better",
arXiv:2106.14881); the tokens are the same in number and order.

Shapes: B pictures, C channels, P patches, D trunk width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config.schema import ModelConfig
from pretrain.model.layers import Linear, RMSNorm


class LinearStem(nn.Module):
    """Each patch flattened and mapped (Dosovitskiy et al. 2020, arXiv:2010.11929)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.size = model.patch_size
        self.out = Linear(3 * model.patch_size**2, model.width)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return tokens `[pictures x patches, width]`, patches in row-major order."""
        pictures, channels, height, width = pixels_BCHW.shape
        rows, columns, size = height // self.size, width // self.size, self.size
        patches = pixels_BCHW.view(pictures, channels, rows, size, columns, size).permute(
            0, 2, 4, 1, 3, 5
        )
        return self.out(patches.reshape(pictures * rows * columns, channels * size * size))  # type: ignore[no-any-return]


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2, each followed by a norm and SiLU, then a linear map."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        channels = model.stem_channels
        self.convs = nn.ModuleList(Conv(*pair) for pair in pairwise(channels))
        self.norms = nn.ModuleList(RMSNorm(width) for width in channels[1:])
        self.out = Linear(channels[-1], model.width)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return tokens `[pictures x patches, width]`, patches in row-major order."""
        x_BHWC = pixels_BCHW.permute(0, 2, 3, 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BHWC = F.silu(norm(conv(x_BHWC)))
        return self.out(x_BHWC.reshape(-1, x_BHWC.shape[-1]))  # type: ignore[no-any-return]


class Conv(nn.Module):
    """A 3x3 convolution of stride 2 without bias over `[pictures, height, width, channels]`."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in, 3, 3))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Halve height and width."""
        weight = self.weight.to(x_BHWC.dtype)
        # Channels stay last in memory, which is what the kernels and the norm like.
        return F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight, stride=2, padding=1).permute(0, 2, 3, 1)


def make_stem(model: ModelConfig) -> nn.Module:
    """The stem that the configuration names."""
    return ConvStem(model) if model.stem == "conv" else LinearStem(model)
