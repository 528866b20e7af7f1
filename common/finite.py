# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which of some tensors holds a value that is not finite?"""

import torch


def first_non_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """The name of the first tensor with an infinite or NaN value, `None` where there is none.

    Integers are finite. Where all is well, each device is read from once.
    """
    checks = {name: tensor.isfinite().all() for name, tensor in tensors.items() if tensor.is_floating_point()}
    devices = {check.device for check in checks.values()}
    together = [torch.stack([check for check in checks.values() if check.device == device]) for device in devices]
    if all(each.all().item() for each in together):
        return None
    return next(name for name, check in checks.items() if not check)
