"""Thirty samples in small shards, and loaders over them."""

from __future__ import annotations

import pytest

from data_pipeline.shards.manifest import Manifest
from tests.support.loaders import COUNT, Setup
from tests.support.small_shards import make_shards, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("shards"), count=COUNT)


@pytest.fixture
def setup(manifest: Manifest, tokenizer_path: str) -> Setup:
    return Setup(manifest, tokenizer_path)
