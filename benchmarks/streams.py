# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What it costs to go on in a stream: images per second that are read without decoding, and how bookmarks shorten it.

    python benchmarks/streams.py

It writes webdataset shards of random JPEG files into a temporary folder and reads them there, so the disk's cache is
warm. A stream from the Hub is as fast as the network.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data import load_images
from common.images import load_pixels
from common.streaming import StreamedDataset, StreamLoader

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from device import describe_device


BATCH = 4  # images
SIDE = 512  # of an image, in pixels


def write_shards(folder: Path, shards: int, images: int) -> float:
    """Webdataset shards with so many images each; returns the mean bytes of an image."""
    draw, files = np.random.default_rng(0), []
    for _ in range(20):
        coarse = draw.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for number in range(images):
                info = tarfile.TarInfo(f"{shard:04d}{number:06d}.jpg")
                content = files[number % len(files)]
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return sum(map(len, files)) / len(files)


def load_examples(batch: dict[str, list], column: str) -> dict[str, list[torch.Tensor]]:
    """Decode, as the scripts do."""
    return {"images": load_pixels(batch[column], "RGB", SIDE)}


def batches_from(folder: Path, run: str, done: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of a run with one data worker that has done so many."""
    columns = {"image_column": "jpg"}
    stream, source = load_images(None, None, str(folder), str(folder / "cache"), columns, streaming=True)
    load = partial(load_examples, column="jpg")
    dataset = StreamedDataset(stream, source, load, "jpg", 0.01, 0, 1000, str(folder / run))
    return StreamLoader(dataset, BATCH, 0, torch.device("cpu")).batches_from(done)


def measure(shards: int, images: int, passes: float) -> dict[str, float]:
    """Seconds to the first batch, at the beginning and after so many passes, without and with bookmarks."""
    PartialState()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_shards(folder, shards, images)
        seconds = []
        done = int(passes * shards * images) // BATCH
        for run, start in (("new", 0), ("run", done), ("run", done)):
            then = time.perf_counter()
            batches = batches_from(folder, run, start)
            next(batches)
            seconds.append(time.perf_counter() - then)
        then, count = time.perf_counter(), 50
        for _ in range(count):
            next(batches)
        decoded = count * BATCH / (time.perf_counter() - then)
    return {
        "images": shards * images,
        "bytes of an image": size,
        "images done": done * BATCH,
        "decoded, images per second": decoded,
        "skipped, images per second": done * BATCH / seconds[1],
        "first batch of a run, s": seconds[0],
        "next batch without bookmarks, s": seconds[1],
        "next batch with bookmarks, s": seconds[2],
    }


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8, help="(default: 8)")
    parser.add_argument("--images", type=int, default=500, help="of each (default: 500)")
    parser.add_argument("--passes", type=float, nargs="+", default=[0.9, 5.9], help="that are done (default: 0.9 5.9)")
    output = Path(__file__).parent / "results" / "streams-cpu.json"
    parser.add_argument("--output", type=Path, default=output, help="JSON file of the results")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    """Measure, print a table, and write the JSON."""
    rows = [measure(args.shards, args.images, passes) for passes in args.passes]
    for name in rows[0]:
        print(f"| {name} | {' | '.join(f'{row[name]:,.6g}' for row in rows)} |")
    result = {"device": describe_device(torch.device("cpu")), "torch": torch.__version__, "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
