"""The documentation is correct: paths exist, links lead somewhere, commands and run files parse."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.cli.main import _parse, build_parser
from pretrain.config.presets import load_run

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
IDS = [path.relative_to(ROOT).as_posix() for path in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)

RUN_BY_TESTS = {"README.md", "docs/getting-started.md", "docs/data-pipeline.md"}
"""Pages whose Python examples the two `test_python_api.py` run."""
OTHER_PROGRAMS = {"export", "git", "pip", "pipx", "srun", "tensorboard"}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FOLDERS = "pretrain|data_pipeline|tools|tests|slurm|ds_configs|docs"


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language, without indentation."""
    return [
        "\n".join(line.removeprefix(indent) for line in text.splitlines())
        for indent, name, text in FENCE.findall(page.read_text())
        if name == language
    ]


def code_spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


def commands(page: Path) -> list[list[str]]:
    """Commands after `$ ` in console blocks, as words, without comments."""
    lines = "\n".join(blocks(page, "console")).replace("\\\n", " ").splitlines()
    found = [line[2:] for line in lines if line.startswith("$ ")]
    return [shlex.split(command, comments=True) for command in found]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"\s", "-", text) for text in words}


def test_all_pages_are_read() -> None:
    assert {"README.md", "docs/architecture.md", "slurm/README.md"} <= {*IDS}
    assert sum(len(commands(page)) for page in PAGES) > 50


@every_page
def test_paths_exist(page: Path) -> None:
    paths = [span for span in code_spans(page) if re.fullmatch(rf"({FOLDERS})/[\w./*-]*", span)]
    assert [path for path in paths if not list(ROOT.glob(path))] == []


def test_architecture_names_the_files_of_each_path() -> None:
    page = ROOT / "docs" / "architecture.md"
    paths = page.read_text().partition("\n## ")[2].split("\n## ")
    assert len(paths) == 5
    for path in paths:
        files = re.findall(rf"`((?:{FOLDERS})/[\w/]+\.py)`", path)
        assert len(files) >= 9, path.splitlines()[0]


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        is_generated = other.name in ("config.md", "api.md")  # `make docs` checks these anchors
        assert not anchor or is_generated or anchor in anchors(other), target


@every_page
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        check_command(words)


def check_command(words: list[str]) -> None:
    """Fail if a command has an unknown program, sub-command or option."""
    while re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "vlmoe":
        parse(arguments)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        target = arguments[0]
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), words
    elif program == "sbatch":
        check_job(arguments)
    elif program in ("python", "torchrun"):
        module, *arguments = arguments[arguments.index("-m") + 1 :]
        if module in ("pretrain", "data_pipeline"):
            parse(arguments if module == "pretrain" else ["data", *arguments])
        else:
            check_tool(module, arguments)
    else:
        assert program in OTHER_PROGRAMS, words


def parse(arguments: list[str]) -> None:
    if "--help" in arguments:
        assert known_options(arguments)
        return
    try:
        _parse(arguments)
    except SystemExit as error:
        raise AssertionError(f"vlmoe {shlex.join(arguments)} does not parse") from error


def check_job(arguments: list[str]) -> None:
    """Parse the command that a job script runs."""
    index = next(i for i, word in enumerate(arguments) if word.endswith(".sbatch"))
    script, arguments = arguments[index], arguments[index + 1 :]
    assert (ROOT / script).is_file(), script
    match Path(script).stem:
        case "pretrain":
            parse(["train", arguments[0], "--out", *arguments[1:]])
        case "parity":
            parse(["parity", arguments[0], "--out", *arguments[1:]])
        case "evaluate":
            parse(["eval", *arguments])
        case "prepare_data":
            parse(["data", *arguments])


def check_tool(module: str, arguments: list[str]) -> None:
    """Check that a tool exists and that its source defines the options."""
    path = ROOT.joinpath(*module.split("."))
    files = [*path.glob("*.py")] if path.is_dir() else [path.with_suffix(".py")]
    files += [ROOT / "tools" / "arguments.py", ROOT / "tools" / "study" / "arguments.py"]
    source = "".join(file.read_text() for file in files)
    for word in arguments:
        if word.startswith("--") and word != "--help":
            assert f'"{word}"' in source, f"{module} has no option {word}"


@every_page
def test_commands_in_sentences_exist(page: Path) -> None:
    for span in code_spans(page):
        if span.startswith("vlmoe "):
            words = span.split()[1:]
            options = known_options(words)
            unknown = [word for word in words if word.startswith("--") and word not in options]
            assert unknown == [], span


def known_options(words: list[str]) -> set[str]:
    """The options of the sub-command that `words` name; a word in capitals is a placeholder."""
    parser = build_parser()
    for word in words:
        choices = next(subcommands(parser), None)
        if choices is None or word.isupper() or word.startswith("-"):
            break
        assert word in choices, f"vlmoe {' '.join(words)}: unknown command {word}"
        parser = choices[word]
    return {option for action in parser._actions for option in action.option_strings}


def subcommands(parser: argparse.ArgumentParser) -> Iterator[dict[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield action.choices


@every_page
def test_run_files_are_valid(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "yaml"):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        load_run(path)


def test_python_examples_are_run_by_tests() -> None:
    pages = {name for name, page in zip(IDS, PAGES, strict=True) if blocks(page, "python")}
    assert pages == RUN_BY_TESTS


@pytest.mark.parametrize(
    "command",
    [
        "vlmoe trian run.yaml",
        "vlmoe parity run.yaml --cells own",
        "vlmoe data stats shards --htlm x",
        "make tset",
        "sbatch slurm/pretrain.sbtch run.yaml runs/a",
        "sbatch slurm/parity.sbatch run.yaml parity/run --cells own",
        "torchrun --nproc-per-node 8 -m pretrain train run.yaml --output runs/a",
        "python -m tools.bench_moe --lod even",
        "python -m tools.bench_moes",
        "unknown-program",
    ],
)
def test_wrong_commands_are_found(command: str) -> None:
    with pytest.raises((AssertionError, OSError, StopIteration)):
        check_command(shlex.split(command))
