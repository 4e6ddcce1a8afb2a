"""`python -m tools.bench_moe`: forward and backward pass of the MoE layer, compared with other
implementations and with the roofline.

On a GPU in bfloat16, timed by CUDA events; on a CPU in float32, in CPU seconds of one thread. On a
CPU the process keeps the memory of freed tensors (`retain_freed_memory`), as training runs do.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from data_pipeline.common.json_file import write_json
from data_pipeline.common.tables import markdown_table
from tools.arguments import benchmark_parser, import_peers, print_error, unknown_name
from tools.bench_moe.shapes import CPU_MEAN, CPU_SHAPES, GPU_SHAPES, LOADS, QUICK_SHAPES, Shape
from tools.measurements import HEADER, Measurement
from tools.reporting import describe_machine, log_progress
from tools.timing import MIN_REPEATS, use_one_thread

if TYPE_CHECKING:
    import torch

    from tools.bench_moe.limits import Limits
    from tools.bench_moe.results import ShapeResult

PACKAGES = ("torch", "deepspeed", "torchtitan", "triton")

EXAMPLES = """\
examples:
  python -m tools.bench_moe                             all shapes for this machine's device
  python -m tools.bench_moe --only many --repeats 40    one shape, more rounds
  python -m tools.bench_moe --device cpu --dtype bf16   on the CPU in bfloat16
  python -m tools.bench_moe --quick                     check that it runs (meaningless numbers)
  pip install --target peers --no-deps torchtitan ...
  python -m tools.bench_moe --peers peers               compare with packages in a folder
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, print a table, write JSON; returns 1 if this project's layer is incorrect.

    Invalid options return 2.
    """
    options = _parse(arguments)
    import_peers(options.peers)
    # torch's profiler logs warnings, for example about memory allocated before it started.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    import torch

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    dtype_name = options.dtype or ("bf16" if on_gpu else "fp32")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name]
    shapes = QUICK_SHAPES if options.quick else GPU_SHAPES if on_gpu else CPU_SHAPES
    if problem := _option_problem(options, shapes, on_gpu=on_gpu):
        return print_error(problem)
    if not on_gpu:
        prepare_cpu()
    return _run(options, shapes, device, dtype)


def _option_problem(options: argparse.Namespace, shapes: tuple[Shape, ...], *, on_gpu: bool) -> str:
    """What is wrong with the options; empty if they are valid."""
    import torch

    if problem := unknown_name(options.only, [shape.name for shape in shapes], "shape"):
        return problem
    if on_gpu and not torch.cuda.is_available():
        return "--device cuda: torch finds no GPU; use --device cpu"
    if options.repeats is not None and options.repeats < 1:
        return (
            f"--repeats is {options.repeats}, but must be at least 1; omit it for the default of "
            f"{MIN_REPEATS}"
        )
    return ""


def _run(
    options: argparse.Namespace,
    shapes: tuple[Shape, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Measure the selected shapes and report the results; returns the exit status."""
    import torch

    from tools.bench_moe.limits import measure_limits
    from tools.bench_moe.results import OURS

    on_gpu = device.type == "cuda"
    machine = describe_machine(PACKAGES)
    machine |= {"gpu": torch.cuda.get_device_name()} if on_gpu else {"threads": 1}
    log_progress(
        f"{machine.get('gpu') or machine['cpu']}, {str(dtype).removeprefix('torch.')}, "
        f"load {machine['load'][0]}"
    )
    limits = measure_limits(device, dtype, quick=options.quick)
    log_progress(
        f"matrix product: {limits.flops_per_second / 1e9:,.0f} GFLOP/s; "
        f"copy: {limits.bytes_per_second / 1e9:,.1f} GB/s"
    )
    repeats = options.repeats or (2 if options.quick else MIN_REPEATS)
    selected = [shape for shape in shapes if not options.only or shape.name in options.only]
    all_shapes = shapes is CPU_SHAPES and selected == list(shapes)

    results: list[ShapeResult] = []
    rows: list[Measurement] = []
    for load in options.load:
        loaded = [shape._replace(load=load) for shape in selected]
        load_results, load_rows = _measure_all(
            loaded, limits, device, dtype, repeats=repeats, means=all_shapes
        )
        results += load_results
        rows += load_rows

    print("\n".join(f"{shape.name}: {shape.describe()}" for shape in selected))
    print("\n".join(f"{load}: {LOADS[load]}" for load in options.load))
    print("\n" + markdown_table(HEADER, [row.row() for row in rows], align="l"))
    write_json(
        options.out,
        {
            "machine": machine,
            "dtype": str(dtype),
            "repeats": repeats,
            "quick": options.quick,
            "limits": limits._asdict(),
            "shapes": [shape._asdict() for shape in selected],
            "results": [_to_json(result) for result in results],
            "measurements": [row.to_json() for row in rows],
        },
    )
    log_progress(f"\nwrote {options.out}")
    return int(any(OURS in result.incorrect for result in results))


def _measure_all(
    shapes: list[Shape],
    limits: Limits,
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int,
    means: bool,
) -> tuple[list[ShapeResult], list[Measurement]]:
    """Results and report rows of shapes with one load, with means over the shapes if asked."""
    from tools.bench_moe.measure import measure
    from tools.bench_moe.results import mean_measurements, measurements

    results: list[ShapeResult] = []
    for shape in shapes:
        results += measure(shape, device, dtype, repeats=repeats)

    rows: list[Measurement] = []
    for result in results:
        rows += measurements(result, limits, dtype, on_gpu=device.type == "cuda")
    if means:
        unreduced = [result for result in results if not result.shape.full_tokens]
        rows += mean_measurements(unreduced, *CPU_MEAN)
    return results, rows


def _to_json(result: ShapeResult) -> dict[str, Any]:
    shape = result.shape
    return asdict(result) | {"shape": shape.name, "load": shape.load, "tokens": shape.tokens}


def prepare_cpu() -> None:
    """Use one thread and keep freed memory, for every implementation alike."""
    from pretrain.parallel.environment import retain_freed_memory

    use_one_thread()
    retain_freed_memory()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(
        "tools.bench_moe",
        __doc__,
        EXAMPLES,
        out="data/bench/moe.json",
        unit="shape",
        peers="torchtitan",
    )
    parser.add_argument(
        "--load",
        nargs="+",
        choices=tuple(LOADS),
        default=list(LOADS),
        help="distribution of tokens over the experts (default: all)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda if available, otherwise cpu"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--quick", action="store_true", help="minimal layers, two rounds")
    parser.add_argument(
        "--repeats", type=int, help=f"rounds of each comparison (default: {MIN_REPEATS})"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
