"""Settings of the transformer trunk, its stem and its heads (`model`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.common.problems import Problems


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer trunk, shared by image patches and text tokens, with its stem and heads."""

    width: int = 128
    """Hidden size of the trunk (D)."""
    num_layers: int = 4
    """Number of transformer blocks."""
    num_heads: int = 4
    """Number of attention heads (H); `width / num_heads` must be a multiple of 4."""
    ffn_width: int = 256
    """Hidden width of the SwiGLU networks in dense blocks."""
    fusion_layer: int = 2
    """Index of the first block in which text attends to the patches of its image."""
    image_size: int = 48
    """Side of the square input image, pixels."""
    patch_size: int = 8
    """Side of a patch, pixels; must divide `image_size`."""
    stem: Literal["linear", "conv"] = "linear"
    """Map from pixels to patch tokens: one linear map, or strided convolutions, with which small
    models learn faster. `conv` needs a `patch_size` that is a power of two."""
    vocab_size: int = 32000
    """Size of the text vocabulary (V); must equal that of the tokenizer. 0 takes it from
    `data.tokenizer`."""
    context_length: int = 64
    """Maximum number of text tokens of a caption, start and end tokens included (S)."""
    embed_dim: int = 128
    """Dimension of the shared image-text embedding."""
    pool_heads: int = 4
    """Number of heads of the attention pooling for the image embedding."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    activation_checkpointing: bool = False
    """Recompute the activations of the blocks in the backward pass to save memory."""

    def problems(self) -> list[str]:
        """Invalid sizes."""
        found = Problems(self, "model")
        found.at_least(1, "ffn_width", "embed_dim")
        width, num_heads, pool_heads = self.width, self.num_heads, self.pool_heads
        found.require(
            num_heads > 0 and width > 0 and width % num_heads == 0,
            f"model.width is {width}, not a multiple of model.num_heads ({num_heads})",
        )
        found.require(
            num_heads < 1 or (width // num_heads) % 4 == 0,
            f"model.width / model.num_heads is {width // max(1, num_heads)}; two-dimensional "
            f"rotary positions need a multiple of 4",
        )
        found.require(
            pool_heads > 0 and width % pool_heads == 0,
            f"model.width is {width}, not a multiple of model.pool_heads ({pool_heads})",
        )
        found.require(
            1 <= self.fusion_layer < self.num_layers,
            f"model.fusion_layer is {self.fusion_layer}, but must be in 1..num_layers-1 "
            f"({self.num_layers - 1}): the text embedding is computed before that block, captions "
            f"after it",
        )
        found.require(
            self.context_length >= 2,
            f"model.context_length is {self.context_length}; start and end tokens need 2",
        )
        found.require(
            self.vocab_size == 0 or self.vocab_size > 4,
            f"model.vocab_size is {self.vocab_size}; four ids are reserved (0 takes the size of "
            f"data.tokenizer)",
        )
        return found.messages + self._image_problems()

    def _image_problems(self) -> list[str]:
        found = Problems(self, "model")
        found.require(
            self.patch_size > 0 and self.image_size > 0 and self.image_size % self.patch_size == 0,
            f"model.image_size is {self.image_size}, not a multiple of model.patch_size "
            f"({self.patch_size})",
        )
        found.require(
            self.stem == "linear" or self.patch_size & (self.patch_size - 1) == 0,
            f"model.patch_size is {self.patch_size}, but each convolution of model.stem=conv "
            f"halves the image: use a power of two, or model.stem=linear",
        )
        return found.messages

    @property
    def num_patches(self) -> int:
        """Number of patches per image (P)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Channels of the convolutional stem: 3 for the pixels, then a quarter, half and all of the
        trunk's width (at least 8)."""
        num_convs = self.patch_size.bit_length() - 1
        return (3, *(max(8, self.width >> max(0, 2 - index)) for index in range(num_convs)))
