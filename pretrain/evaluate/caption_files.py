"""`vlmoe caption`: one line for each image file; other files are listed with a reason."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.common.addresses import without_secrets
from data_pipeline.common.errors import DataError
from data_pipeline.common.escaping import escape_control
from data_pipeline.common.tables import format_bytes
from pretrain.evaluate.command import make_evaluator
from pretrain.evaluate.evaluator import evaluation_mode
from pretrain.evaluate.generated_captions import IMAGES_PER_FORWARD, CaptionInput
from pretrain.evaluate.trained_model import TrainedModel, load_model

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|file:|data:", re.IGNORECASE)
_KINDS = {
    stat.S_IFDIR: "a folder; give the image files in it",
    stat.S_IFIFO: "a named pipe, not a file",
    stat.S_IFSOCK: "a socket, not a file",
    stat.S_IFCHR: "a device, not a file",
    stat.S_IFBLK: "a device, not a file",
}


def caption_command(run_dir: Path, images: Sequence[str | os.PathLike[str]]) -> None:
    """Generate a caption for each image and print one `PATH: caption` per line.

    Control characters in paths and captions are escaped.

    Raises:
        DataError: Some files are not images; captions of the others have been printed.
    """
    trained = load_model(run_dir)
    inputs: list[CaptionInput] = []
    problems: list[str] = []
    for path in images:
        name = os.fspath(path)
        shown = escape_control(without_secrets(name))
        try:
            image = trained.preprocess(_read_file(name, trained.run.data.limits.sample_bytes))
        except DataError as error:
            problems.append(f"{shown}: {escape_control(str(error))}")
            continue
        inputs.append(CaptionInput(shown, (), image))
        if len(inputs) == IMAGES_PER_FORWARD:
            _print_captions(trained, inputs)
            inputs = []

    _print_captions(trained, inputs)
    if problems:
        listed = "\n  ".join(problems)
        raise DataError(f"{len(problems)} of {len(images)} images could not be read:\n  {listed}")


def _print_captions(trained: TrainedModel, inputs: Sequence[CaptionInput]) -> None:
    if not inputs:
        return
    with evaluation_mode(trained.model):
        captions = make_evaluator(trained).generate(inputs)
    for key, caption in zip(captions.keys, captions.generated, strict=True):
        print(f"{key}: {escape_control(caption)}", flush=True)


def _read_file(name: str, max_bytes: int) -> bytes:
    """The content of a regular file; never waits for a pipe or a device.

    Raises:
        DataError: It is an address, not a regular file, too large, or cannot be read.
    """
    try:
        # The type is checked first, because opening a device can have an effect.
        kind = _KINDS.get(stat.S_IFMT(os.stat(name).st_mode))
        if kind is not None:
            raise DataError(f"it is {kind}")
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise DataError(_os_reason(name, error)) from error
    if len(data) > max_bytes:
        raise DataError(
            f"it is larger than {format_bytes(max_bytes)} (data.limits.sample_bytes of the run)"
        )
    return data


def _os_reason(name: str, error: OSError) -> str:
    if error.errno == errno.ENOENT and _ADDRESS.match(name):
        return "addresses are not fetched; download the image and give the path of the file"
    if error.errno == errno.ENOENT and name == "-":
        return "standard input is not read; give the path of a file"
    return error.strerror or str(error)
