"""A trained model in one process: embeds images and texts, generates captions.

Shapes: N images, M texts, D embedding width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.image import decode_image, eval_transform, pillow_pixels
from data_pipeline.content.tokenizer import Tokenizer, TokenizerError
from pretrain.checkpoint import CheckpointError, find_latest, load_model_weights, read_meta
from pretrain.config.paths import CONFIG_FILE, TOKENIZER_FILE
from pretrain.config.presets import load_run
from pretrain.config.schema import PrecisionConfig, RunConfig
from pretrain.evaluate.embed import embed_texts
from pretrain.evaluate.generation import generate_captions
from pretrain.model import VisionLanguageModel, build_model

BATCH_SIZE = 64
"""Images or texts per forward pass."""
ImageLike = str | os.PathLike[str] | bytes | np.ndarray | Tensor | Image.Image
"""An image: the path or the bytes of a file, pixels as an array uint8 `[height, width, 3 or 4]`, a
Pillow image, or the result of `TrainedModel.preprocess`."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """The model of a run folder; `pretrain.load_model` loads it.

    Example:
        model = load_model("runs/quickstart")
        images_ND = model.embed_images(["fox.jpg", "owl.jpg"])
        texts_MD = model.embed_texts(["a fox", "an owl"])
        similarity_NM = images_ND @ texts_MD.T
        captions = model.caption(["fox.jpg"])
    """

    run_dir: Path
    run: RunConfig
    model: VisionLanguageModel
    """In evaluation mode, float32, all experts in this process."""
    tokenizer: Tokenizer
    step: int
    """Optimizer steps of the checkpoint."""
    device: torch.device

    def preprocess(self, image: ImageLike) -> Tensor:
        """The model's input for one image, as in `vlmoe eval`: a square by `data.image_mode`.

        Returns:
            uint8 `[3, side, side]` on CPU.

        Raises:
            DataError: Not an image, or corrupt, or an array or tensor of another shape.
            OSError: The file cannot be read.
        """
        side = self.run.model.image_size
        if isinstance(image, Tensor):
            if image.dtype != torch.uint8 or tuple(image.shape) != (3, side, side):
                raise DataError(
                    f"a tensor of shape {list(image.shape)} and {image.dtype} was given as an "
                    f"image, but a preprocessed image is uint8 [3, {side}, {side}]; give a path, "
                    f"bytes, an array [height, width, 3] or a Pillow image to preprocess it"
                )
            return image
        return torch.as_tensor(eval_transform(_pixels(image), side, self.run.data.image_mode))

    def embed_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Unit vectors of images, float32 `[N, D]` on CPU."""
        embeddings = [torch.zeros(0, self.run.model.embed_dim)]
        for batch in self._image_batches(images):
            with torch.no_grad():
                embeddings.append(self.model.encode_image(batch).cpu())
        return torch.cat(embeddings)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, float32 `[M, D]` on CPU."""
        if isinstance(texts, str):
            raise TypeError("embed_texts needs a list of texts, but a single text was given")
        if not texts:
            return torch.zeros(0, self.run.model.embed_dim)
        with torch.no_grad():
            return embed_texts(
                self.model,
                self.tokenizer,
                texts,
                context_length=self.run.model.context_length,
                texts_per_forward=BATCH_SIZE,
                device=self.device,
            ).cpu()

    def caption(self, images: Sequence[ImageLike]) -> list[str]:
        """Generate one caption for each image by greedy decoding."""
        captions: list[str] = []
        for batch in self._image_batches(images):
            token_ids = generate_captions(
                self.model,
                batch,
                start_id=self.tokenizer.start_id,
                end_id=self.tokenizer.end_id,
                max_length=self.run.model.context_length,
            )
            captions += [self.tokenizer.decode(ids) for ids in token_ids]
        return captions

    def _image_batches(self, images: Sequence[ImageLike]) -> Iterator[Tensor]:
        if isinstance(images, str | bytes | os.PathLike):
            raise TypeError("a list of images is needed, but a single image was given")
        for first in range(0, len(images), BATCH_SIZE):
            batch = [self.preprocess(image) for image in images[first : first + BATCH_SIZE]]
            yield torch.stack(batch).to(self.device)


def _pixels(image: str | os.PathLike[str] | bytes | np.ndarray | Image.Image) -> np.ndarray:
    """uint8 RGB or RGBA pixels, `[height, width, 3 or 4]`."""
    if isinstance(image, bytes):
        return decode_image(image)
    if isinstance(image, str | os.PathLike):
        return decode_image(Path(image).read_bytes())
    if not isinstance(image, np.ndarray):
        return pillow_pixels(ImageOps.exif_transpose(image))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise DataError(
            f"an array of shape {list(image.shape)} and {image.dtype} was given as an image, "
            f"expected uint8 [height, width, 3] (RGB) or [height, width, 4] (RGBA)"
        )
    return image


def load_model(
    run_dir: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> TrainedModel:
    """Load the newest checkpoint of a run, independent of the layout that wrote it.

    Args:
        run_dir: The run folder.
        device: Device of the model; None for the first GPU, or the CPU without GPU.

    Raises:
        ConfigError: `run_dir` is not a run folder.
        TokenizerError: The tokenizer is missing, or is not the one of the checkpoint.
        CheckpointError: There is no checkpoint, all are incomplete, or its weights do not fit
            the run's model.
    """
    run_dir = Path(run_dir)
    config = run_dir / CONFIG_FILE
    if not config.is_file():
        parents = [parent for parent in run_dir.parents[:2] if (parent / CONFIG_FILE).is_file()]
        hint = f"; the folder of its run is {parents[0]}" if parents else ""
        raise ConfigError(f"{run_dir} is not a run folder: it does not contain {CONFIG_FILE}{hint}")
    run = load_run(config)
    path = find_latest(run_dir / "checkpoints")
    if path is None:
        raise CheckpointError(
            f"{run_dir} contains no checkpoint; train the run, or wait for its first checkpoint"
        )

    meta = read_meta(path)
    tokenizer = Tokenizer.load(run_dir / TOKENIZER_FILE)
    _check_tokenizer(tokenizer, meta.state.get("tokenizer"), run_dir)
    # Float32 whatever the training precision: slower, but without rounding noise in the ranking.
    model = build_model(replace(run, precision=PrecisionConfig(compute="fp32")))
    _load_weights(model, load_model_weights(path), path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return TrainedModel(
        run_dir=run_dir,
        run=run,
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        step=meta.step,
        device=device,
    )


def _check_tokenizer(tokenizer: Tokenizer, expected: str | None, run_dir: Path) -> None:
    if tokenizer.fingerprint != expected:
        raise TokenizerError(
            f"{run_dir / TOKENIZER_FILE} has fingerprint {tokenizer.fingerprint[:12]}, but the "
            f"checkpoint was trained with {str(expected)[:12]}; restore the tokenizer of this run"
        )


def _load_weights(model: VisionLanguageModel, weights: Mapping[str, Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    actual = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    different = sorted(
        name for name in {*expected, *actual} if expected.get(name) != actual.get(name)
    )
    if different:
        name = different[0]
        raise CheckpointError(
            f"{path} does not match the run's {CONFIG_FILE}: {len(different)} weights differ; "
            f"{name} is {actual.get(name, 'missing')} in the checkpoint and "
            f"{expected.get(name, 'missing')} in the model"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
