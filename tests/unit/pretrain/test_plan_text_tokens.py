"""`vlmoe plan --text-tokens`: FLOPs of captions that can be, and a word about those that cannot."""

from __future__ import annotations

import json

import pytest

from pretrain.cli.main import main


def counted(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[float, str]:
    """The text tokens that FLOPs were counted for, and what was said beside them."""
    assert main(["plan", "tiny", "--json", *words]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out)["flops_per_pair"]["text_tokens"], printed.err


@pytest.mark.parametrize("asked", ["-5", "nan", "inf"])
@pytest.mark.parametrize("also", [[], ["--twin"]])
def test_what_no_caption_can_have_is_refused(
    asked: str, also: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "tiny", "--text-tokens", asked, *also]) == 2
    assert (
        f"error: --text-tokens is {asked}, but must be a finite number of tokens"
        in capsys.readouterr().err
    )


def test_more_than_a_caption_holds_is_said_and_not_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokens, said = counted(capsys, "--text-tokens", "100")
    assert tokens == 64 and "captions end at model.context_length (64)" in said
    assert counted(capsys, "--text-tokens", "12.5") == (12.5, "")
    assert counted(capsys) == (16, "")
    assert counted(capsys, "model.context_length=8") == (8, "")
