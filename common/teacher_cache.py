# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How does the teacher run before the training alone, on draws that the seed fixes?

A step's draws are its noise, timesteps, flips and dropped captions. Those of a cached run depend on the seed, the row
and the number of the pass: they are made again whenever the row is read, and only the prediction on them is stored.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from common.cache import JoinedDataset, identify, read_rows
from common.costs import DTYPES
from common.teachers import TeacherSource
from common.training import place_seed

import torch
from accelerate.utils import send_to_device

from lift_utils import FeatureModel


Batch = dict[str, Any]  # tensors (B, ...), and by "draws" a dictionary of such


class DrawnDataset(torch.utils.data.Dataset):
    """The rows of a dataset several times over, each time with other draws beside them, by "draws".

    Row n · N + i is the i-th of N with its n-th draws. They come from the CPU's generator, so that every machine makes
    the same.

    Args:
        dataset: Rows of tensors.
        passes: How often.
        seed: Of the draws.
        draw: From a number of rows and a device to their draws, tensors (B, ...).
        shape_of: From a row to what `draw` takes as "shape"; `None` where all rows have the one that it knows.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        passes: int,
        seed: int,
        draw: Callable[..., dict[str, torch.Tensor]],
        shape_of: Callable[[Batch], tuple[int, ...]] | None = None,
    ):
        self.dataset, self.passes, self.seed, self.draw, self.shape_of = dataset, passes, seed, draw, shape_of

    def __len__(self) -> int:
        return self.passes * len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """A batch of rows, read together."""
        places = [divmod(index, len(self.dataset)) for index in indices]
        rows, drawn = read_rows(self.dataset, [row for _, row in places]), []
        with torch.random.fork_rng(devices=[]):
            for (number, row), values in zip(places, rows):
                # torch.manual_seed would seed every kind of device, too: for a row that took a sixth of a small step.
                torch.default_generator.manual_seed(place_seed(self.seed, number, row))
                known = {"shape": self.shape_of(values)} if self.shape_of else {}
                draws = self.draw(1, torch.device("cpu"), **known)
                drawn.append({name: tensor[0] for name, tensor in draws.items()})
        return [{**row, "draws": draws} for row, draws in zip(rows, drawn)]


def cache_predictions(
    dataset: torch.utils.data.Dataset,
    teacher: torch.nn.Module,
    make_inputs: Callable[[Batch], tuple],
    draw: partial,
    passes: int,
    seed: int,
    storage: str,
    source: TeacherSource,
    parts: list[str],
    key: dict[str, Any],
    cache: Callable,
    device: torch.device,
    shape_of: Callable[[Batch], tuple[int, ...]] | None = None,
) -> JoinedDataset:
    """The rows of a dataset `passes` times over with their "draws", and by "teacher" the prediction on them.

    Args:
        teacher: Of [`common.teacher_weights.hold_teacher`].
        make_inputs: From a batch to the keyword arguments of the teacher, and more.
        draw: See [`DrawnDataset`]; its keywords, JSON-serialisable, go into the key.
        seed: Of the draws.
        storage: "fp32", "fp16" or "bf16", which the predictions are rounded to.
        source: Where the teacher comes from.
        parts: The folders of its pipeline that shape a prediction.
        key: What shapes one beside that: the data, the noise schedule.
        cache: [`common.cache.cache_encodings`] with all but the data, the models, the key, and what is said here.
        shape_of: See [`DrawnDataset`].
    """
    drawn, model = DrawnDataset(dataset, passes, seed, draw, shape_of), FeatureModel(teacher, [])

    def load_teacher() -> Callable:
        def encode(batch: Batch) -> dict[str, torch.Tensor]:
            inputs = make_inputs(send_to_device(batch, device))[0]
            return {"teacher": predict(model, inputs, batch)[0].to(DTYPES[storage])}

        return encode

    # The number of passes is no part of it: a cache of more passes goes on from one of fewer.
    key = key | identify(source.path, source.revision, parts) | {"variant": source.variant}
    held = sorted({str(weight.dtype) for weight in teacher.parameters()})
    key |= {"seed": seed, "stored": storage, "dtype": str(teacher.dtype), "held": held, "draws": draw.keywords}
    words = {"period": len(dataset), "description": "Caching the teacher", "batch_flag": "--train_batch_size"}
    remedy = "pass --cache_teacher_dtype bf16 or fp32, --mixed_precision bf16 or no, or another teacher"
    words["overflow"] = f"--cache_teacher_dtype {storage}: the teacher's prediction is not finite; {remedy}"
    return JoinedDataset([drawn, cache(drawn, load_teacher, key, **words)])


@torch.no_grad()
def predict(
    teacher: FeatureModel | None, inputs: dict[str, torch.Tensor], batch: Batch
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The teacher's prediction and features: computed now, or taken from a cached batch.

    Args:
        teacher: Of [`common.teacher_weights.hold_teacher`]; `None` for a cached batch, which has no features.
        inputs: Keyword arguments of the model.
    """
    if teacher is None:
        return batch["teacher"], []
    return teacher(**inputs)
