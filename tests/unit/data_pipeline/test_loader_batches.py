"""Contents of the loader's batches: tensors, buffers, augmentation, captions, and one pass over
all samples."""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.common.errors import ConfigError
from data_pipeline.content.captions import hash_caption
from data_pipeline.content.image import decode_image, eval_transform
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading import collate
from data_pipeline.loading.loader import Loader
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import write_shards
from tests.support.loaders import NUM_SAMPLES, LoaderFactory, steps_equal, take_steps
from tests.support.small_shards import make_caption, make_data_config, make_png, make_samples


def images_by_key(loader: Loader, steps: int) -> dict[str, list[torch.Tensor]]:
    images: dict[str, list[torch.Tensor]] = {}
    for batches in take_steps(loader, steps)[0]:
        for batch in batches:
            for key, image in zip(batch.keys, batch.images, strict=True):
                images.setdefault(key, []).append(image)
    return images


def test_augmentation_depends_on_sample_and_epoch_only(factory: LoaderFactory) -> None:
    expected = images_by_key(factory.open(), 8)
    shifted = images_by_key(factory.open(position=3), 3)
    assert all(torch.equal(images[0], expected[key][0]) for key, images in shifted.items())

    changed = [
        not torch.equal(images[0], images[1]) for images in expected.values() if len(images) > 1
    ]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("context_length", [16, 64])
def test_contents_of_a_batch(
    factory: LoaderFactory, manifest: Manifest, tokenizer: Tokenizer, context_length: int
) -> None:
    batches = list(factory.evaluate(context_length=context_length))
    assert [len(batch.keys) for batch in batches] == [4] * 7 + [2]

    sample = 0
    for batch in batches:
        size, width = batch.text_ids.shape
        assert batch.images.dtype == torch.uint8
        assert width % 8 == 0
        assert width == -(-int(batch.text_lengths.max()) // 8) * 8
        positions = [
            row * width + offset for row in range(size) for offset in range(batch.text_lengths[row])
        ]
        assert batch.text_positions.tolist() == positions
        assert batch.seconds > 0

        for row in range(size):
            caption = make_caption(sample)
            assert (batch.keys[row], batch.captions[row]) == (f"{sample:05d}", caption)
            ids = tokenizer.encode(caption, context_length)
            assert batch.text_ids[row].tolist() == ids + [tokenizer.pad_id] * (width - len(ids))
            assert batch.text_lengths[row] == len(ids)
            assert batch.caption_hashes[row] == hash_caption(caption)
            image = eval_transform(decode_image(make_png(sample)), 8)
            assert np.array_equal(batch.images[row].numpy(), image)
            sample += 1
    assert sample == manifest.total_samples


def test_previous_contents_of_a_buffer_do_not_matter(
    factory: LoaderFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(factory.evaluate(context_length=64))
    assert any((batch.text_ids == Tokenizer.pad_id).any() for batch in expected)

    def allocate(num_bytes: int) -> tuple[torch.Tensor, bool]:
        return torch.full((num_bytes,), 171, dtype=torch.uint8), False

    monkeypatch.setattr(collate, "_allocate", allocate)
    assert steps_equal([list(factory.evaluate(context_length=64))], [expected])


def test_buffers_are_not_reused_while_referenced(factory: LoaderFactory) -> None:
    """A reference to a batch, or to one row of it, must keep its contents unchanged."""
    expected = take_steps(factory.open(), 40)[0]
    with closing(factory.open(data=make_data_config(workers=1, prefetch=2))) as loader:
        kept: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        for step, (batches, _) in enumerate(itertools.islice(loader.steps(), 40)):
            if step % 7 == 3:  # the whole batch
                kept.append((step, batches[0].images, batches[0].text_ids))
            if step % 7 == 5:  # one row
                kept.append((step, batches[0].images[-1:], batches[0].text_ids[-1:]))
            del batches

        for step, images, text_ids in kept:
            batch = expected[step][0]
            assert torch.equal(images, batch.images[-len(images) :])
            assert torch.equal(text_ids, batch.text_ids[-len(text_ids) :])


def test_one_pass_with_ranks_workers_and_indices(factory: LoaderFactory) -> None:
    expected = list(factory.evaluate())
    ranks = [list(factory.evaluate(rank=rank, world_size=3)) for rank in range(3)]
    combined = [
        batch for row in itertools.zip_longest(*ranks) for batch in row if batch is not None
    ]
    assert steps_equal([combined], [expected])
    assert steps_equal([list(factory.evaluate(workers=2))], [expected])

    selected = list(factory.evaluate(indices=[29, 3, 3, 7, 8]))
    keys = [batch.keys for batch in selected]
    assert keys == [("00029", "00003", "00003", "00007"), ("00008",)]
    assert list(factory.evaluate(indices=[])) == []
    with pytest.raises(ConfigError, match=r"3\.\.30 are out of range.*has 30"):
        list(factory.evaluate(indices=[3, 30]))


def test_global_random_state_is_unchanged(factory: LoaderFactory) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take_steps(factory.open(data=make_data_config(workers=1)), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_caption_sampling(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Keys are sampled by weight, and captions of a list uniformly."""
    samples = [
        sample | {"json": {"alt": [f"alt {i}", f"other {i}"]}}
        for i, sample in enumerate(make_samples(NUM_SAMPLES))
    ]
    factory = LoaderFactory(write_shards(samples, tmp_path), tokenizer)
    data = make_data_config(caption_keys=("txt", "json:alt"), caption_weights=(1.0, 2.0))
    batches = [batch for step in take_steps(factory.open(data=data), 75)[0] for batch in step]

    first_words = [text.split()[0] for batch in batches for text in batch.captions]
    for word in ("a", "alt", "other"):
        # 600 samples: 5 sigma.
        assert first_words.count(word) / len(first_words) == pytest.approx(1 / 3, abs=0.1)

    # The hash is that of the first caption, whichever was sampled.
    for batch in batches:
        expected = [hash_caption(make_caption(int(key))) for key in batch.keys]
        assert batch.caption_hashes.tolist() == expected
