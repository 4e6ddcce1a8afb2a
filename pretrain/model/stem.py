"""Stem from pixels to patch tokens: one linear map, or a few strided convolutions.

With a convolutional stem, small transformers learn from far fewer images than with a linear map of
whole patches (Xiao et al. 2021, "Early Convolutions Help Transformers See Better",
arXiv:2106.14881). Number and order of the tokens are the same.

Shapes: B images, C channels, H height, W width, P patches, D trunk width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config.schema import ModelConfig
from pretrain.model.layers import Linear, RMSNorm


class LinearStem(nn.Module):
    """Linear map of flattened patches (Dosovitskiy et al. 2020, arXiv:2010.11929)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.size = model.patch_size
        self.out = Linear(3 * model.patch_size**2, model.width)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return tokens `[images x patches, width]`, patches in row-major order."""
        images, channels, height, width = pixels_BCHW.shape
        rows, columns, size = height // self.size, width // self.size, self.size
        patches = pixels_BCHW.view(images, channels, rows, size, columns, size)
        patches = patches.permute(0, 2, 4, 1, 3, 5)
        flat = patches.reshape(images * rows * columns, channels * size * size)
        return self.out(flat)  # type: ignore[no-any-return]


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2, each followed by a norm and SiLU, then a linear map."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        channels = model.stem_channels
        self.convs = nn.ModuleList(Conv(*pair) for pair in pairwise(channels))
        self.norms = nn.ModuleList(RMSNorm(width) for width in channels[1:])
        self.out = Linear(channels[-1], model.width)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return tokens `[images x patches, width]`, patches in row-major order."""
        x_BHWC = pixels_BCHW.permute(0, 2, 3, 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BHWC = F.silu(norm(conv(x_BHWC)))
        return self.out(x_BHWC.reshape(-1, x_BHWC.shape[-1]))  # type: ignore[no-any-return]


class Conv(nn.Module):
    """A 3x3 convolution of stride 2 without bias over `[images, height, width, channels]`."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in, 3, 3))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Return an output of half the height and width."""
        weight = self.weight.to(x_BHWC.dtype)
        # Channels-last memory is faster for the convolution kernels and the norm.
        return F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight, stride=2, padding=1).permute(0, 2, 3, 1)


def make_stem(model: ModelConfig) -> nn.Module:
    """The stem that `model.stem` selects."""
    return ConvStem(model) if model.stem == "conv" else LinearStem(model)
