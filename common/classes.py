# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which class of the model is a label of the data, and what are the classes called?"""

from collections import defaultdict
from typing import Any

from common.errors import fail

import datasets
from accelerate.logging import get_logger


logger = get_logger(__name__)


def number_labels(
    dataset: datasets.Dataset | datasets.IterableDataset, column: str, num_classes: int, known: dict[int, str]
) -> tuple[list[int] | None, dict[int, str]]:
    """How the labels of a dataset number the classes of a model, by the kind of their column alone.

    Names that are numbers are these. Others are those of the model's classes, or where it does not know them all, they
    are numbered in their order.

    Args:
        dataset: Of which the features are asked.
        column: The column of the labels: class numbers, or names as the sub-folders of images give them.
        num_classes: Of the model. Its classes are 0, ..., num_classes - 1.
        known: Names of these classes by number, if the model has names. One may list several, with commas between.

    Returns:
        The model's class of each label of the dataset, `None` where the two are the same; and the names of the
        classes by number, as far as the dataset has names.
    """
    kind, numbers, names = dataset.features[column], None, {}
    if isinstance(kind, datasets.ClassLabel):
        # Sorted as text, "10" comes before "2".
        numbers = [int(name) for name in kind.names] if all(name.isdecimal() for name in kind.names) else None
        numbers = numbers or _match_names(kind.names, known)
        names = dict(zip(numbers or range(len(kind.names)), kind.names))
    elif not (isinstance(kind, datasets.Value) and "int" in kind.dtype):
        fail(f"--label_column {column} holds {kind}; pass a column of class numbers, or a sub-folder per class")
    if names and numbers is None and len(names) != num_classes:
        logger.warning(f"the data have {len(names)} classes, the model {num_classes}: class i is the i-th name")
    return numbers, names


def _match_names(names: list[str], known: dict[int, str]) -> list[int] | None:
    """The numbers of these names among the known ones, `None` where they are not all known."""
    numbers = _numbers_by_name(known)
    unknown = [name for name in names if len(numbers[name]) != 1]  # ImageNet has two cranes
    if len(unknown) == len(names):
        return None
    if unknown:
        found = f"{unknown[0]} is not one of the teacher's classes, and {len(names) - len(unknown)} others are"
        logger.warning(f"{found}: class i is the i-th name; for its classes name all as it does, or by their numbers")
        return None
    return [numbers[name][0] for name in names]


def _numbers_by_name(names: dict[int, str]) -> defaultdict[str, list[int]]:
    """The numbers of the classes that have a name, by themselves or among several with commas between."""
    numbers = defaultdict(list)
    for number, name in names.items():
        for part in {name, *map(str.strip, name.split(","))}:
            numbers[part].append(number)
    return numbers


def find_class(entry: str, num_classes: int, names: dict[int, str], flag: str) -> int:
    """The number of a class that is given by its number or name. One that is no class, or several, ends the run.

    Args:
        entry: The number or the name.
        num_classes: Of the model.
        names: Of its classes by number, as far as they are known. A name may list several, with commas between.
        flag: That gives it.
    """
    found = [int(entry)] if entry.isdecimal() else _numbers_by_name(names)[entry]
    if len(found) > 1:
        fail(f"{flag} {entry} is the name of the classes {found}; pass one of these numbers")
    if not found or not 0 <= found[0] < num_classes:
        fail(f"{flag} {entry} is no class; pass a number below {num_classes}, or a name of its classes")
    return found[0]


def number_classes(
    dataset: datasets.Dataset, column: str, num_classes: int, known: dict[int, str]
) -> tuple[list[int] | None, dict[int, str]]:
    """[`number_labels`] of a dataset, whose labels are all looked at: one that is no class ends the run."""
    numbers, names = number_labels(dataset, column, num_classes, known)
    labels = [number_label(label, numbers) for label in dataset[column][:]]
    wrong = [row for row, label in enumerate(labels) if label is None or not 0 <= label < num_classes]
    if wrong:
        found = f"{len(wrong)} of {len(labels)} labels are none of the model's 0 to {num_classes - 1}"
        fail(f"--label_column {column}: {found}, the first {labels[wrong[0]]} in row {wrong[0]}; correct them")
    return numbers, names


def number_label(label: int | None, numbers: list[int] | None) -> int | None:
    """The model's class of a label; -1, by which `datasets` marks what has no label, and `None` stay as they are."""
    return label if numbers is None or label in (None, -1) else numbers[label]


def find_wrong_label(
    row: dict[str, Any], label_column: str, numbers: list[int] | None, num_classes: int
) -> str | None:
    """What is wrong with a row's label; `None` where it is a class of the model. See [`number_labels`]."""
    label = number_label(row[label_column], numbers)
    if label is not None and 0 <= label < num_classes:
        return None
    return f"have a label, such as {label}, that is none of the model's 0 to {num_classes - 1}"


def read_classes(chosen: list[str] | None, num_classes: int, names: dict[int, str]) -> dict[int, str]:
    """The classes that `--validation_classes` chooses, each by number or name; without it the first eight.

    Args:
        chosen: The flag's value.
        num_classes: Of the model.
        names: Of its classes by number, as far as they are known.

    Returns:
        A label for each class, by number.
    """
    first = [str(number) for number in sorted(names or range(num_classes))[:8]]
    numbers = [find_class(entry, num_classes, names, "--validation_classes") for entry in chosen or first]
    return {number: names.get(number, f"class {number}") for number in numbers}
