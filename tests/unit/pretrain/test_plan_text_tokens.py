"""`vlmoe plan --text-tokens`: the mean caption length for which FLOPs are counted."""

from __future__ import annotations

import json

import pytest

from pretrain.cli.main import main


def planned_text_tokens(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[float, str]:
    """The text tokens for which FLOPs are counted, and the output on stderr."""
    assert main(["plan", "tiny", "--json", *options]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out)["flops_per_pair"]["text_tokens"], printed.err


@pytest.mark.parametrize("value", ["-5", "nan", "inf"])
@pytest.mark.parametrize("extra", [[], ["--dense-baseline"]])
def test_invalid_values(value: str, extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "--text-tokens", value, *extra]) == 2
    error = capsys.readouterr().err
    assert f"error: --text-tokens is {value}," in error and "finite" in error


def test_values_above_the_context_length_are_reduced(capsys: pytest.CaptureFixture[str]) -> None:
    text_tokens, stderr = planned_text_tokens(capsys, "--text-tokens", "100")
    assert text_tokens == 64
    assert "model.context_length (64)" in stderr
    assert planned_text_tokens(capsys, "--text-tokens", "12.5") == (12.5, "")
    assert planned_text_tokens(capsys) == (16, "")
    assert planned_text_tokens(capsys, "model.context_length=8") == (8, "")
