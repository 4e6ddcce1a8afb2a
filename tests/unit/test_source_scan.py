"""No source of the programs runs what it reads: no pickles, no shells, no eval; and none listens
beyond this machine. Read from the syntax tree, so that words in texts and comments do not count."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pretrain", "data_pipeline", "tools")

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
    "jsonpickle",
    "code",
}
"""Reading with these runs whatever the file says."""
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
    "pty.spawn",
    "commands.getoutput",
    "os.execl",
    "os.execlp",
    "os.spawnl",
    "os.spawnlp",
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "pandas.read_pickle",
    "numpy.memmap.loads",
    "tempfile.mktemp",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.unsafe_load_all",
    "yaml.full_load_all",
    "yaml.load_all",
}
OBJECTS_OVER_PROCESSES = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
"""torch.distributed pickles for these."""
LISTENERS = {
    "bind",
    "create_server",
    "start_server",
    "HTTPServer",
    "ThreadingHTTPServer",
    "TCPServer",
    "ThreadingTCPServer",
    "UDPServer",
    "SimpleXMLRPCServer",
}
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
EVERYWHERE = {"0.0.0.0", "::", "[::]", "0:0:0:0:0:0:0:0"}


def findings(source: str) -> list[str]:
    """What is wrong in one file, as `line: what`."""
    tree = ast.parse(source)
    names = dict(imported_names(tree))
    safe_loaders = {"SafeLoader", "CSafeLoader", "yaml.SafeLoader", "yaml.CSafeLoader"} | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(dotted(base, names).endswith("SafeLoader") for base in node.bases)
    }
    found = []
    for node in ast.walk(tree):
        for what in problems(node, names, safe_loaders):
            found.append(f"{getattr(node, 'lineno', 0)}: {what}")
    return found


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each local name of an import and what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    alias.asname or alias.name.split(".")[0],
                    alias.name if alias.asname else alias.name.split(".")[0],
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`os.system` for whatever the file calls it; empty for anything that is no name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else f"?.{node.attr}"
    return ""


def problems(node: ast.AST, names: dict[str, str], safe_loaders: set[str]) -> Iterator[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        modules = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
        yield from (f"imports {module}" for module in modules if module.split(".")[0] in MODULES)
    if isinstance(node, ast.Constant) and node.value in EVERYWHERE:
        yield f"the address {node.value} of all networks"
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = dotted(node, names)
        if name in CALLS:
            yield f"uses {name}"
        if name.rpartition(".")[2] in OBJECTS_OVER_PROCESSES:
            yield f"pickles by {name}"
    if isinstance(node, ast.Call):
        yield from call_problems(node, dotted(node.func, names), names, safe_loaders)


def call_problems(
    node: ast.Call, name: str, names: dict[str, str], safe_loaders: set[str]
) -> Iterator[str]:
    if name in BUILTINS or name in {f"builtins.{builtin}" for builtin in BUILTINS}:
        yield f"calls {name}"
    for keyword in node.keywords:
        fixed = keyword.value.value if isinstance(keyword.value, ast.Constant) else "not a constant"
        if keyword.arg in ("shell", "allow_pickle") and fixed is not False:
            yield f"{keyword.arg}={fixed}"
        if keyword.arg == "weights_only" and fixed is not True:
            yield f"weights_only={fixed}"
    if name == "yaml.load":
        loaders = [word.value for word in node.keywords if word.arg == "Loader"] + node.args[1:]
        if not loaders or dotted(loaders[0], names) not in safe_loaders:
            yield "yaml.load without a safe loader"
    if name.rpartition(".")[2] in LISTENERS and node.args and not is_loopback(node.args):
        yield f"{name} on an address that is not loopback"


def is_loopback(arguments: list[ast.expr]) -> bool:
    """Whether a server's address is written out and reaches only this machine; a path of a Unix
    socket is fine."""
    first = (
        arguments[0].elts[0]
        if isinstance(arguments[0], ast.Tuple) and arguments[0].elts
        else arguments[0]
    )
    if isinstance(first, ast.Constant):
        return first.value in LOOPBACK or str(first.value).startswith("/")
    return False


def python_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_no_source_runs_what_it_reads_or_listens_to_the_network() -> None:
    files = python_files()
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT)}:{problem}"
        for path in files
        for problem in findings(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_no_shell_script_evaluates_text_or_runs_downloads() -> None:
    scripts = [*ROOT.glob("slurm/*"), ROOT / "Makefile"]
    assert len(scripts) > 3
    dangerous = re.compile(
        r"(^|[;&|(`]|\bthen|\bdo|\belse)\s*eval\s|\|\s*(ba|z)?sh\b|python3?\s+-c\s+\"[^\"]*\$"
    )
    for path in scripts:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            code = line.partition("#")[0]
            assert not dangerous.search(code), f"{path.name}:{number}: {line}"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import pickle", "imports pickle"),
        ("from pickle import loads", "imports pickle"),
        ("import a.b, marshal as m", "imports marshal"),
        ("import os\nos.system('x')", "uses os.system"),
        ("import os as o\no.popen('x')", "uses os.popen"),
        ("from os import system as run\nrun('x')", "uses os.system"),
        ("import os\nf = os.system", "uses os.system"),
        ("import torch\ntorch.load('x', weights_only=True)", "uses torch.load"),
        ("from torch import load\nload('x')", "uses torch.load"),
        ("f(x, weights_only=False)", "weights_only=False"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "shell=True"),
        ("import subprocess\nsubprocess.run('x', shell=flag)", "shell=not a constant"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle=True"),
        ("eval('1')", "calls eval"),
        ("exec('1')", "calls exec"),
        ("import builtins\nbuiltins.eval('1')", "calls builtins.eval"),
        ("__import__('os')", "calls __import__"),
        ("import yaml\nyaml.load(t)", "yaml.load without"),
        ("import yaml\nyaml.load(t, yaml.Loader)", "yaml.load without"),
        ("import yaml\nyaml.load(t, Loader=yaml.UnsafeLoader)", "yaml.load without"),
        ("import yaml\nclass L(yaml.FullLoader): ...\nyaml.load(t, Loader=L)", "yaml.load without"),
        ("import yaml\nyaml.unsafe_load(t)", "uses yaml.unsafe_load"),
        ("import torch.distributed as dist\ndist.all_gather_object(a, b)", "pickles by"),
        ("s.bind(('', 80))", "not loopback"),
        ("s.bind((host, 80))", "not loopback"),
        ("from http.server import HTTPServer\nHTTPServer(('192.168.0.1', 0), H)", "not loopback"),
        ("HOST = '0.0.0.0'", "of all networks"),
        ("serve(host='::')", "of all networks"),
    ],
)
def test_the_scan_finds(source: str, problem: str) -> None:
    assert any(problem in found for found in findings(source)), findings(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile('x')",
        "'import pickle; eval(1)'  # os.system",
        "import yaml\nclass L(yaml.SafeLoader): ...\nyaml.load(t, Loader=L)",
        "import yaml\nyaml.load(t, yaml.SafeLoader)\nyaml.safe_load(t)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import subprocess\nsubprocess.run(['x'], shell=False)",
        "s.bind(('127.0.0.1', 0))\ns.bind('/tmp/socket')",
        "import json\njson.load(f)",
    ],
)
def test_the_scan_lets_harmless_code_be(source: str) -> None:
    assert findings(source) == []
