"""`vlmoe settings` prints a run file with all defaults and a description of every setting."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator

import pytest
import yaml

from data_pipeline.common.config import from_mapping, to_mapping
from data_pipeline.common.describe_settings import describe_settings, field_docs
from data_pipeline.common.errors import ConfigError
from data_pipeline.settings import DataConfig, SourceConfig
from pretrain.cli.main import main
from pretrain.config.experts import PerModality
from pretrain.config.schema import RunConfig


def sections(cls: type) -> Iterator[type]:
    """A configuration class and all classes nested in it."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield from sections(part)


def without_line_breaks(text: str) -> str:
    return " ".join(text.replace("#", "").split())


def test_output_is_a_run_file_with_all_defaults() -> None:
    printed = yaml.safe_load(describe_settings(RunConfig))
    assert to_mapping(from_mapping(RunConfig, printed)) == to_mapping(RunConfig())
    augment = yaml.safe_load(describe_settings(RunConfig, "data.augment"))
    assert augment == printed["data"]["augment"]


@pytest.mark.parametrize("cls", dict.fromkeys([*sections(RunConfig), *sections(DataConfig)]))
def test_every_setting_has_a_description(cls: type) -> None:
    descriptions = field_docs(cls)
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if not (dataclasses.is_dataclass(hint) and isinstance(hint, type)):
            assert len(descriptions.get(field.name, "")) > 5, f"{cls.__name__}.{field.name}"


def test_required_settings_and_lists() -> None:
    text = describe_settings(RunConfig, "data.train")
    shards = next(line for line in text.splitlines() if "shards:" in line)
    assert shards.startswith("#") and "weight: null" in text
    for field in dataclasses.fields(SourceConfig):
        assert f"{field.name}:" in text


def test_unknown_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.augmnt: .*'augment'"):
        describe_settings(RunConfig, "data.augmnt")
    assert main(["settings", "optin"]) == 2
    assert "'optim'" in capsys.readouterr().err


def test_one_setting() -> None:
    text = describe_settings(RunConfig, "moe.top_k")
    assert text.splitlines()[-1] == "top_k: 2" and "# Number of routed experts" in text
    with pytest.raises(ConfigError, match=r"moe\.topk: .*'top_k'"):
        describe_settings(RunConfig, "moe.topk")
    with pytest.raises(ConfigError, match=r"moe\.zzz: .*num_experts, top_k"):
        describe_settings(RunConfig, "moe.zzz")


def test_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "optim"]) == 0
    assert "lr: 0.001" in capsys.readouterr().out


def test_literal_values_and_section_descriptions() -> None:
    text = without_line_breaks(describe_settings(RunConfig, "balance"))
    assert "One of none, sign, zscore." in text
    # The description of the field, not of its class.
    assert "LIMoE's global entropy loss" in text
    assert PerModality.__doc__ and PerModality.__doc__ not in text
