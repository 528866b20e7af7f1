# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What the LIFT and PLACE losses cost, compared with a plain mean squared error.

Times the forward and backward pass of each loss at the output shapes of the training scripts, and prints a Markdown
table: median milliseconds and, in brackets, how many times as long as the MSE. No model runs here, so a large ratio
may still be a small share of a training step; benchmarks/step.py measures that share.

    python benchmarks/loss.py                # on the GPU if there is one; takes seconds, on a CPU too
    python benchmarks/loss.py --device cpu --threads 1
    python benchmarks/loss.py --dtype bfloat16 --group_size 64 --json benchmarks/results/loss.json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device import describe_device
from lift_utils import check_group_size, lift_place_loss


# A batch of model outputs: images for the pixel U-Nets, latents for the others.
SHAPES = {
    "pixel U-Net, 32 px": (96, 3, 32, 32),
    "pixel U-Net, 64 px": (96, 3, 64, 64),
    "SD 2.1, 512 px": (4, 4, 64, 64),
    "DiT-XL/2, 256 px": (32, 4, 32, 32),
    "SD3, 512 px": (4, 16, 64, 64),
}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help='"cpu", "cuda" or "cuda:1"; default: cuda if there is one')
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--group_size", type=int, default=16, help="elements per group of PLACE (default: 16)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed runs of each loss and shape (default: 2)")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each loss and shape (default: 10)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch; default: torch's own choice")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results to this file")
    args = parser.parse_args(input_args)

    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        args.device = torch.device(args.device)
    except RuntimeError:
        parser.error(f'--device {args.device} is not a device; pass "cpu" or "cuda"')
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f'--device {args.device} cannot be timed here; pass "cpu" or "cuda"')
    if args.device.type == "cuda":
        args.device = torch.device("cuda", args.device.index or 0)
        if args.device.index >= torch.cuda.device_count():
            parser.error(f"--device {args.device} asks for a GPU torch does not see; pass --device cpu")
    for flag, least in (("warmup", 0), ("repeats", 1), ("threads", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            parser.error(f"--{flag} {value} is too small; pass {least} or more")
    for _, _, height, width in SHAPES.values():
        try:
            check_group_size(args.group_size, height * width)
        except ValueError as error:
            parser.error(f"--{error}")
    return args


def time_once(backward: Callable[[], object], device: torch.device) -> float:
    """Milliseconds from the call until the device has finished the work."""
    if device.type == "cpu":
        start = time.perf_counter()
        backward()
        return 1000 * (time.perf_counter() - start)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    backward()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def time_losses(shape: tuple[int, ...], args: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of a forward and backward pass of each loss, for predictions of one shape."""
    generator = torch.Generator().manual_seed(0)
    teacher, noise = torch.randn(2, *shape, generator=generator)
    teacher, student = (
        tensor.to(args.device, getattr(torch, args.dtype)) for tensor in (teacher, 0.9 * teacher + 0.2 * noise)
    )
    student.requires_grad_()
    losses = {
        "MSE": lambda: torch.nn.functional.mse_loss(student, teacher),
        "LIFT": lambda: lift_place_loss(student, teacher, group_size=None).loss,
        "PLACE": lambda: lift_place_loss(student, teacher, group_size=args.group_size).loss,
    }
    times = {name: [] for name in losses}
    for _ in range(args.warmup + args.repeats):
        # One after the other, so that a slow moment of the machine affects all three losses alike.
        for name, loss in losses.items():
            times[name].append(time_once(lambda loss=loss: torch.autograd.grad(loss(), student), args.device))
    return {name: statistics.median(values[args.warmup :]) for name, values in times.items()}


def main(args: argparse.Namespace) -> None:
    """Time all losses at all shapes, print the table, and write the JSON."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)  # events are recorded on the current device's stream

    results = {
        "device": describe_device(args.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "group_size": args.group_size,
        "repeats": args.repeats,
        "rows": [],
    }
    print(f"{results['device']}, torch {results['torch']}, {results['threads']} CPU threads, {args.dtype} outputs,")
    print(f"PLACE in groups of {args.group_size}; medians of {args.repeats} forward and backward passes\n")
    print("| output | shape | MSE ms | LIFT ms | PLACE ms |")
    print("|---|---|--:|--:|--:|")
    for target, shape in SHAPES.items():
        row = {f"{name.lower()}_ms": milliseconds for name, milliseconds in time_losses(shape, args).items()}
        row |= {f"{name}_ratio": row[f"{name}_ms"] / row["mse_ms"] for name in ("lift", "place")}
        results["rows"].append({"target": target, "shape": shape, **row})
        cells = [f"{row[f'{name}_ms']:.3g} ({row[f'{name}_ratio']:.1f}×)" for name in ("lift", "place")]
        print(f"| {target} | {'×'.join(map(str, shape))} | {row['mse_ms']:.3g} | {' | '.join(cells)} |", flush=True)

    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
