"""`vlmoe settings`: what it prints is a run file with all defaults, and every setting is
explained."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator

import pytest
import yaml

from data_pipeline.common.config import from_mapping, to_mapping
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.explain import explain, field_texts
from data_pipeline.settings import DataConfig, SourceConfig
from pretrain.cli.main import main
from pretrain.config.schema import RunConfig


def sections(cls: type) -> Iterator[type]:
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield from sections(part)


def test_the_settings_are_a_run_file_with_all_defaults() -> None:
    printed = yaml.safe_load(explain(RunConfig))
    assert to_mapping(from_mapping(RunConfig, printed)) == to_mapping(RunConfig())
    assert yaml.safe_load(explain(RunConfig, "data.augment")) == printed["data"]["augment"]


@pytest.mark.parametrize("cls", dict.fromkeys([*sections(RunConfig), *sections(DataConfig)]))
def test_every_setting_has_its_text(cls: type) -> None:
    texts = field_texts(cls)
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if not (dataclasses.is_dataclass(hint) and isinstance(hint, type)):
            assert len(texts.get(field.name, "")) > 5, f"{cls.__name__}.{field.name} has no text"


def test_what_must_be_given_and_what_is_in_a_list() -> None:
    text = explain(RunConfig, "data.train")
    assert "# shards: must be given" in text and "weight: null" in text
    for field in dataclasses.fields(SourceConfig):
        assert f"{field.name}:" in text


def test_a_wrong_section_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.augmnt: no such section; did you mean 'augment'"):
        explain(RunConfig, "data.augmnt")
    assert main(["settings", "optin"]) == 2
    assert "did you mean 'optim'" in capsys.readouterr().err
    assert main(["settings", "optim"]) == 0
    assert "lr: 0.001" in capsys.readouterr().out


def test_settings_with_few_values_name_them_and_sections_say_what_they_are_for() -> None:
    text = explain(RunConfig, "balance")
    assert "One of none, sign, zscore." in " ".join(text.replace("#", "").split())
    assert "# How far the entropy of a modality's mean gate scores falls short" in text
    assert "A number for each modality" not in text
