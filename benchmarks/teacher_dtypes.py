# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What a teacher's prediction loses to --teacher_dtype: its relative error against float32, by timestep.

    python benchmarks/teacher_dtypes.py --teachers pixel=teacher sd3=demo-sd3/teacher --images images

The images get noise as in the training; half precision and what is widened for the computation (fp8, nf4) computes in
bfloat16. The error is the norm of the difference over the norm of the float32 prediction, over all images.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import fail
from common.teacher_weights import count_bytes, hold_teacher

import report
from device import describe_device


DTYPES = ("fp16", "bf16", "fp8", "nf4")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", required=True, help="name=folder of each pipeline")
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--count", type=int, default=32, help="of the images (default: 32)")
    parser.add_argument("--timesteps", type=int, default=10, help="evenly spaced ones (default: 10)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(input_args)
    for teacher in args.teachers:
        if "=" not in teacher:
            fail(f"--teachers {teacher} has no name; pass name=folder")
    return args


@torch.no_grad()
def measure(folder: str, images: str, count: int, timesteps: int, device: torch.device) -> dict[str, dict]:
    """Bytes of the weights, and relative errors by timestep, for each of [`DTYPES`]."""
    flags = ["--teacher", folder, "--students", folder, "--names", "itself", "--images", images]
    flags += ["--columns", str(count)]
    flags = report.parse_args(flags)
    settings = report.flags_of(folder, flags)
    pipeline, conditions, _, texts = report.load_model(settings, device, count, "--teachers")
    shown = report.fit_images(pipeline, report.real_images(flags), settings)
    inputs = report.make_inputs(pipeline, shown, conditions, texts, settings, timesteps)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    model = getattr(pipeline, part).float()
    expected = report.predict(pipeline, inputs)
    results = {"timesteps": inputs.timesteps.tolist(), "fp32": {"bytes": count_bytes(model, "fp32", "no")}}
    for dtype in DTYPES:
        teacher = hold_teacher(copy.deepcopy(model), dtype, torch.bfloat16, device, offload=False)
        setattr(pipeline, part, teacher)
        errors = (report.predict(pipeline, inputs) - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        results[dtype] = {"bytes": count_bytes(model, dtype, "bf16"), "errors": errors.tolist()}
    return results


def print_table(name: str, results: dict[str, dict]) -> None:
    """The smallest, the median and the largest error over the timesteps."""
    print(f"\n{name}\n\n| weights | MB | least | median | largest | at timestep |\n|---|--:|--:|--:|--:|--:|")
    for dtype in DTYPES:
        errors = results[dtype]["errors"]
        worst = results["timesteps"][errors.index(max(errors))]
        low, high, middle = min(errors), max(errors), sorted(errors)[len(errors) // 2]
        size = results[dtype]["bytes"] / 1e6
        print(f"| {dtype} | {size:.2f} | {low:.2%} | {middle:.2%} | {high:.2%} | {worst:.0f} |")


def main(args: argparse.Namespace) -> None:
    """Measure all teachers, print a table for each, and write the JSON."""
    device = report.pick_device()
    results = {"device": describe_device(device), "torch": torch.__version__, "images": args.count, "teachers": {}}
    for teacher in args.teachers:
        name, folder = teacher.split("=", 1)
        results["teachers"][name] = measure(folder, args.images, args.count, args.timesteps, device)
        print_table(name, results["teachers"][name])
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
