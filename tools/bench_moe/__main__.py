"""`python -m tools.bench_moe`: the MoE layer, forward and backward, against others and against what
is possible.

On a GPU in bfloat16, by events of the device; on CPU in float32, CPU seconds of one thread. In all
arms on CPU the memory of freed tensors is kept by the process (`keep_freed_memory`, as every run
does).
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench_moe.shapes import CPU_MEAN, CPU_SHAPES, GPU_SHAPES, LOADS, QUICK_SHAPES
from tools.benchmark import MIN_REPEATS, machine, note, one_thread, table, write_json

if TYPE_CHECKING:
    from tools.bench_moe.measure import Measured
    from tools.figures import Figure

PACKAGES = ("torch", "deepspeed", "torchtitan", "triton")

EXAMPLES = """\
examples:
  python -m tools.bench_moe                             every shape of this machine's device
  python -m tools.bench_moe --only many --repeats 40    one shape, more rounds
  python -m tools.bench_moe --device cpu --dtype bf16   on the CPU in bfloat16
  python -m tools.bench_moe --quick                     does it run at all? (the figures mean nothing)
  pip install --target peers --no-deps torchtitan ... && python -m tools.bench_moe --peers peers
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write JSON; returns 1 when our layer gives wrong answers."""
    options = _parse(arguments)
    for folder in options.peers:
        sys.path.append(str(folder))  # behind everything: the versions that are installed win
    # What the profiler says of itself, and of memory that it did not see from the start.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    import torch

    from tools.bench_moe.limits import measure_limits
    from tools.bench_moe.measure import OURS, figures, mean_figures, measure

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[
        options.dtype or ("bf16" if on_gpu else "fp32")
    ]
    shapes = QUICK_SHAPES if options.quick else GPU_SHAPES if on_gpu else CPU_SHAPES
    if unknown := [name for name in options.only if name not in [shape.name for shape in shapes]]:
        print(
            f"error: --only {unknown[0]}: no such shape; there are {', '.join(s.name for s in shapes)}",
            file=sys.stderr,
        )
        return 2
    if on_gpu and not torch.cuda.is_available():
        print("error: --device cuda: torch sees no GPU here; use --device cpu", file=sys.stderr)
        return 2
    if options.repeats is not None and options.repeats < 1:
        print(
            f"error: --repeats is {options.repeats}, but must be at least 1; leave it out for the usual number",
            file=sys.stderr,
        )
        return 2
    if not on_gpu:
        prepare_cpu()
    about = machine(PACKAGES) | (
        {"gpu": torch.cuda.get_device_name()} if on_gpu else {"threads": 1}
    )
    note(
        f"{about.get('gpu') or about['cpu']}, {str(dtype).removeprefix('torch.')}, load {about['load'][0]}"
    )
    limits = measure_limits(device, dtype, quick=options.quick)
    note(
        f"one product: {limits.flops_per_second / 1e9:,.0f} GFLOP/s; "
        f"one copy: {limits.bytes_per_second / 1e9:,.1f} GB/s"
    )
    repeats = options.repeats or (2 if options.quick else MIN_REPEATS)
    chosen = [shape for shape in shapes if not options.only or shape.name in options.only]
    found: list[Measured] = []
    lines: list[Figure] = []
    for load in options.load:
        of_load = [
            measured
            for shape in chosen
            for measured in measure(shape._replace(load=load), device, dtype, repeats=repeats)
        ]
        for measured in of_load:
            lines += figures(measured, limits, dtype, on_gpu=on_gpu)
        if shapes is CPU_SHAPES and chosen == list(shapes):
            lines += mean_figures(
                [each for each in of_load if not each.shape.whole_tokens], *CPU_MEAN
            )
        found += of_load
    from tools.figures import HEAD

    print("\n".join(f"{shape.name}: {shape.words()}" for shape in chosen))
    print("\n".join(f"{load}: {LOADS[load]}" for load in options.load))
    print("\n" + table([line.row() for line in lines], HEAD))
    write_json(
        options.out,
        {
            "machine": about,
            "dtype": str(dtype),
            "repeats": repeats,
            "quick": options.quick,
            "limits": limits._asdict(),
            "shapes": [shape._asdict() for shape in chosen],
            "measured": [
                asdict(each)
                | {"shape": each.shape.name, "load": each.shape.load, "tokens": each.shape.tokens}
                for each in found
            ],
            "figures": [line.to_json() for line in lines],
        },
    )
    note(f"\nalso in {options.out}")
    return int(any(OURS in each.wrong for each in found))


def prepare_cpu() -> None:
    """One thread, and freed memory is kept, for every arm alike."""
    from pretrain.parallel.environment import keep_freed_memory

    one_thread()
    keep_freed_memory()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_moe",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="SHAPE", help="a shape; may be given again"
    )
    parser.add_argument(
        "--load",
        nargs="+",
        choices=tuple(LOADS),
        default=list(LOADS),
        help="how tokens are spread over the experts (default: each way)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the GPU if there is one"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="default: bf16 on GPU, fp32 on CPU"
    )
    parser.add_argument("--quick", action="store_true", help="tiny layers, two rounds")
    parser.add_argument(
        "--repeats", type=int, help=f"rounds of each comparison (default {MIN_REPEATS})"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/bench/moe.json"), help="the report (%(default)s)"
    )
    parser.add_argument(
        "--peers",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder of packages (pip install --target) in which to look for torchtitan",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
