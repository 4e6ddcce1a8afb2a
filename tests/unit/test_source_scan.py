"""Scans the source code for unsafe deserialization, code execution and network listeners.

The scan uses the syntax tree, so strings and comments are ignored.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pretrain", "data_pipeline", "tools")

UNSAFE_MODULES = {
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
"""Modules that execute code from the data they read."""
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {
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
OBJECT_COLLECTIVES = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
"""Collectives of torch.distributed that pickle."""
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
ALL_INTERFACES = {"0.0.0.0", "::", "[::]", "0:0:0:0:0:0:0:0"}


def scan(source: str) -> list[str]:
    """Problems in one file, as `LINE: PROBLEM`."""
    tree = ast.parse(source)
    names = dict(imported_names(tree))
    safe_loaders = {"SafeLoader", "CSafeLoader", "yaml.SafeLoader", "yaml.CSafeLoader"} | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(qualified_name(base, names).endswith("SafeLoader") for base in node.bases)
    }
    return [
        f"{getattr(node, 'lineno', 0)}: {problem}"
        for node in ast.walk(tree)
        for problem in node_problems(node, names, safe_loaders)
    ]


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local name and qualified name of each import."""
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


def qualified_name(node: ast.AST, names: dict[str, str]) -> str:
    """Qualified name such as `os.system`, resolving imports; empty if `node` is not a name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = qualified_name(node.value, names)
        return f"{base}.{node.attr}" if base else f"?.{node.attr}"
    return ""


def node_problems(node: ast.AST, names: dict[str, str], safe_loaders: set[str]) -> Iterator[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        modules = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
        yield from (
            f"imports {module}" for module in modules if module.split(".")[0] in UNSAFE_MODULES
        )
    if isinstance(node, ast.Constant) and node.value in ALL_INTERFACES:
        yield f"address {node.value} of all interfaces"
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = qualified_name(node, names)
        if name in UNSAFE_CALLS:
            yield f"uses {name}"
        if name.rpartition(".")[2] in OBJECT_COLLECTIVES:
            yield f"pickles with {name}"
    if isinstance(node, ast.Call):
        yield from call_problems(node, qualified_name(node.func, names), names, safe_loaders)


def call_problems(
    node: ast.Call, name: str, names: dict[str, str], safe_loaders: set[str]
) -> Iterator[str]:
    if name in UNSAFE_BUILTINS or name in {f"builtins.{builtin}" for builtin in UNSAFE_BUILTINS}:
        yield f"calls {name}"
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else "not a constant"
        if keyword.arg in ("shell", "allow_pickle") and value is not False:
            yield f"{keyword.arg}={value}"
        if keyword.arg == "weights_only" and value is not True:
            yield f"weights_only={value}"
    if name == "yaml.load":
        loaders = [
            keyword.value for keyword in node.keywords if keyword.arg == "Loader"
        ] + node.args[1:]
        if not loaders or qualified_name(loaders[0], names) not in safe_loaders:
            yield "yaml.load without a safe loader"
    if name.rpartition(".")[2] in LISTENERS and node.args and not is_loopback(node.args):
        yield f"{name} on an address that is not loopback"


def is_loopback(arguments: list[ast.expr]) -> bool:
    """Whether a server's address is a loopback literal or the path of a Unix socket."""
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


def test_source_code_is_safe() -> None:
    files = python_files()
    assert len(files) > 100
    problems = [
        f"{path.relative_to(ROOT)}:{problem}"
        for path in files
        for problem in scan(path.read_text())
    ]
    assert not problems, "\n".join(problems)


def test_shell_scripts_do_not_evaluate_text() -> None:
    scripts = [*ROOT.glob("slurm/*"), ROOT / "Makefile"]
    assert len(scripts) > 3
    dangerous = re.compile(
        r"(^|[;&|(`]|\bthen|\bdo|\belse)\s*eval\s|\|\s*(ba|z)?sh\b|python3?\s+-c\s+\"[^\"]*\$"
    )
    for path in scripts:
        for line_number, line in enumerate(path.read_text().splitlines(), start=1):
            code = line.partition("#")[0]
            assert not dangerous.search(code), f"{path.name}:{line_number}: {line}"


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
        ("import torch.distributed as dist\ndist.all_gather_object(a, b)", "pickles with"),
        ("s.bind(('', 80))", "not loopback"),
        ("s.bind((host, 80))", "not loopback"),
        ("from http.server import HTTPServer\nHTTPServer(('192.168.0.1', 0), H)", "not loopback"),
        ("HOST = '0.0.0.0'", "of all interfaces"),
        ("serve(host='::')", "of all interfaces"),
    ],
)
def test_scan_reports(source: str, problem: str) -> None:
    assert any(problem in reported for reported in scan(source)), scan(source)


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
def test_scan_accepts_safe_code(source: str) -> None:
    assert scan(source) == []
