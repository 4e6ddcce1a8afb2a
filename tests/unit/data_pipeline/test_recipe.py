from __future__ import annotations

import json
import pickle  # noqa: TID251 - a recipe travels to worker processes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.captions import caption_hash
from data_pipeline.content.colors import jitter
from data_pipeline.content.draws import COUNT, draws
from data_pipeline.content.images import decode
from data_pipeline.content.recipe import IMAGE_EXTENSIONS, Item, Recipe
from data_pipeline.content.transforms import COLOR_DRAWS, eval_transform, planes, train_transform
from data_pipeline.content.views import GEOMETRY_DRAWS
from data_pipeline.samples import RawSample
from data_pipeline.settings import AugmentConfig, FilterConfig
from tests.support.pictures import encoded, photo, psnr, smooth

SHIFTED = AugmentConfig(flip=True, crop_scale=(0.4, 1.0), affine_degrees=10, random_background=True)
COLORED = replace(SHIFTED, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)


class Letters:
    """A tokenizer of code points."""

    def encode_clean(self, caption: str, max_length: int) -> list[int]:
        return [1, *map(ord, caption[: max_length - 2]), 2]


def recipe(**changes: Any) -> Recipe:
    given: dict[str, Any] = {
        "image_size": 24,
        "context_length": 16,
        "caption_keys": ("txt", "json:more"),
        "caption_weights": (1.0, 1.0),
        "seed": 5,
        "augment": SHIFTED,
    }
    return Recipe(**given | changes)


def raw(key: str = "k", **members: bytes) -> RawSample:
    given = {
        "png": encoded(smooth(40, 60, channels=4), "PNG"),
        "txt": b"A  cat",
        "json": json.dumps({"more": ["one", "two"]}).encode(),
    }
    return RawSample("s.tar", key, given | members)


def make(found: Recipe, sample: RawSample, epoch: int = 0, out: np.ndarray | None = None) -> Item:
    return found.make(sample, epoch, Letters(), out)  # type: ignore[arg-type]


def test_an_item_is_its_parts_put_together() -> None:
    for epoch in range(6):
        item = make(recipe(), raw(), epoch)
        numbers = draws(b"sample", 5, epoch, "s.tar", "k")
        expected = train_transform(
            decode(raw().members["png"]), 24, SHIFTED, numbers[:GEOMETRY_DRAWS]
        )
        np.testing.assert_array_equal(item.image_CHW, expected)
        options = ["A cat"] if numbers[12] < 0.5 else ["one", "two"]
        assert item.caption == options[int(numbers[13] * len(options))]
        assert item.ids == [1, *map(ord, item.caption), 2]
        assert item.caption_hash == caption_hash(
            "a cat"
        )  # of the first caption, whichever was drawn
        assert item.key == "k"


def test_evaluation_draws_nothing() -> None:
    for epoch in (0, 1):
        item = make(recipe(augment=None, caption_keys=("json:more", "txt")), raw(), epoch)
        np.testing.assert_array_equal(
            item.image_CHW, eval_transform(decode(raw().members["png"]), 24)
        )
        assert item.caption == "one"


def test_a_sample_looks_the_same_whoever_reads_it_and_different_each_time() -> None:
    def sent_to_a_worker() -> Recipe:
        return pickle.loads(pickle.dumps(recipe(augment=COLORED)))  # noqa: S301

    first, again = (make(sent_to_a_worker(), raw(), 3) for _ in range(2))
    np.testing.assert_array_equal(first.image_CHW, again.image_CHW)
    others = [
        make(recipe(augment=COLORED), raw(), 4),
        make(recipe(augment=COLORED, seed=6), raw(), 3),
        make(recipe(augment=COLORED), raw("l"), 3),
        make(recipe(augment=COLORED), raw()._replace(shard="t.tar"), 3),
    ]
    assert all((other.image_CHW != first.image_CHW).mean() > 0.5 for other in others)


def test_color_jitter_leaves_all_other_draws_as_they_were() -> None:
    for epoch in range(4):
        plain, colored = (
            make(recipe(augment=augment), raw(), epoch) for augment in (SHIFTED, COLORED)
        )
        assert colored.caption == plain.caption
        named = draws(b"colour", 5, epoch, "s.tar", "k")[:COLOR_DRAWS]
        expected = planes(
            jitter(np.ascontiguousarray(plain.image_CHW.transpose(1, 2, 0)), COLORED, named)
        )
        np.testing.assert_array_equal(colored.image_CHW, expected)
        assert (colored.image_CHW != plain.image_CHW).mean() > 0.5


@pytest.mark.parametrize("augment", [None, AugmentConfig(), SHIFTED, COLORED])
def test_a_picture_is_written_where_it_is_wanted(augment: AugmentConfig | None) -> None:
    batch = np.full((3, 3, 24, 24), 77, np.uint8)
    for sample in (raw(), raw(png=encoded(smooth(24, 24), "PNG"))):
        item = make(recipe(augment=augment), sample, 0, batch[1])
        assert np.shares_memory(item.image_CHW, batch)
        np.testing.assert_array_equal(batch[1], make(recipe(augment=augment), sample).image_CHW)
        assert (batch[[0, 2]] == 77).all()


def test_draws_are_fixed_for_ever_and_depend_on_every_part() -> None:
    numbers = draws(b"sample", 1, 2, "shard", "key")
    assert numbers[:3] == [0.36659216694533825, 0.33065076149068773, 0.37546042795293033]
    assert len(numbers) == COUNT >= GEOMETRY_DRAWS + 2
    names = [
        (b"sample", 1, 2, "shard", "key"),
        (b"colour", 1, 2, "shard", "key"),
        (b"sample", 11, 2, "shard", "key"),
        (b"sample", 1, 12, "shard", "key"),
        (b"sample", 1, 2, "shardk", "ey"),
        (b"sample", 1, 2, "shar", "dkey"),
        (b"sample", 1, 2, "shard", "key "),
        (b"sample", -1, 2, "shard", "key"),
        (b"sample", 1, 2, "shard", "k\udcffey"),
    ]
    assert len({tuple(draws(*name)) for name in names}) == len(names)


def test_draws_are_even_and_independent() -> None:
    table = np.array([draws(b"sample", 0, 0, "s", str(key)) for key in range(4000)])
    assert table.min() >= 0 and table.max() < 1
    assert np.abs(table.mean(axis=0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(table.T) - np.eye(COUNT)).max() < 0.07


def test_a_large_jpeg_is_decoded_reduced_and_only_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = raw(jpg=encoded(photo(400, 656), "JPEG", quality=92))
    del sample.members["png"]
    whole = decode(sample.members["jpg"])
    reductions: list[int] = []
    from data_pipeline.content import recipe as module

    decoded = module.decode_pixels

    def noted(*given: Any) -> tuple[np.ndarray, int]:
        pixels, reduced = decoded(*given)
        reductions.append(reduced)
        return pixels, reduced

    monkeypatch.setattr(module, "decode_pixels", noted)
    for size, reduced in ((24, 8), (50, 4), (100, 2), (200, 1)):
        item = make(recipe(augment=AugmentConfig(), image_size=size), sample)
        assert psnr(item.image_CHW, eval_transform(whole, size)) > 33
        exact = make(recipe(augment=None, image_size=size), sample)
        np.testing.assert_array_equal(exact.image_CHW, eval_transform(whole, size))
        assert reductions == [reduced, 1]
        reductions.clear()


def test_members_that_are_neither_picture_text_nor_json_are_never_touched() -> None:
    class Untouchable(bytes):
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"somebody looked at {name}")

    names = "pyd pkl pickle pth pt npy npz cls sh py exe jpg.pkl txt.npy index"
    others = {name: Untouchable() for name in names.split()}
    sample = RawSample("s.tar", "k", others | raw().members)
    np.testing.assert_array_equal(make(recipe(), sample).image_CHW, make(recipe(), raw()).image_CHW)
    with pytest.raises(DataError) as caught:
        make(recipe(), RawSample("s.tar", "k", others | {"txt": b"x"}))
    assert caught.value.slug == "no-image"
    with pytest.raises(DataError) as caught:
        make(recipe(), RawSample("s.tar", "k", others | {"png": raw().members["png"]}))
    assert caught.value.slug == "no-caption"
    assert not {"pkl", "npy", "pth", "pyd", "sh"} & IMAGE_EXTENSIONS


def test_the_first_picture_is_taken_and_its_name_may_have_several_parts() -> None:
    two = RawSample(
        "s.tar",
        "k",
        {
            "left.png": encoded(np.zeros((24, 24, 3), np.uint8), "PNG"),
            "png": encoded(np.full((24, 24, 3), 255, np.uint8), "PNG"),
            "txt": b"x",
        },
    )
    assert make(recipe(augment=None), two).image_CHW.max() == 0


def test_what_costs_least_is_looked_at_first() -> None:
    empty = raw(png=b"", txt=b" ", json=b"{}")
    with pytest.raises(DataError) as caught:
        make(recipe(filters=FilterConfig(require=("json:a > 1",))), empty)
    assert caught.value.slug == "filter:a"
    with pytest.raises(DataError) as caught:
        make(recipe(), empty)
    assert caught.value.slug == "no-caption"
    with pytest.raises(ConfigError, match="caption key 'pkl'"):
        recipe(caption_keys=("pkl", "txt"))
