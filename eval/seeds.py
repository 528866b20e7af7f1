# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What is said of figures that several seeds gave."""

import numpy as np
from scipy import stats


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN of a single value."""
    array = np.array(values)
    return array.mean().item(), (array.std(ddof=1) / np.sqrt(len(array))).item() if len(array) > 1 else float("nan")


def cell(values: list[float], digits: int = 1) -> str:
    """A table's cell: the mean ± its standard error."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if np.isfinite(error) else "")


def interval(values: list[float], others: list[float], digits: int = 2) -> str:
    """A table's cell: the mean difference of values of the same seeds, with its 95 % interval (Student's t)."""
    differences = np.subtract(values, others)
    if len(differences) < 2:
        return "–"
    mean, error = np.mean(differences), stats.sem(differences)
    reach = error * stats.t.ppf(0.975, len(differences) - 1)
    low, middle, high = (f"{value:+.{digits}f}" for value in (mean - reach, mean, mean + reach))
    return f"{middle} ({low} to {high})"
