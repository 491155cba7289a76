"""Checks of tensors at the public boundary."""

import pytest
import torch

from dq_hf.modeling.modeling_utils_dq import check_indices


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_indices_of_any_integer_type_become_long(dtype):
    indices = check_indices("codes", torch.tensor([0, 3], dtype=dtype), ("B",), 4, "cpu")
    assert indices.dtype == torch.long and indices.tolist() == [0, 3]
    assert check_indices("codes", torch.zeros(0, dtype=dtype), ("B",), 4, "cpu").shape == (0,)
