import pytest
import torch

from gdn2.models.device import prepare_device


def test_a_device_computes_float32_products_in_float32():
    torch.set_float32_matmul_precision("high")
    assert prepare_device("cpu") == torch.device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'tpu'"):
        prepare_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda:0' was asked for, but torch sees no CUDA"):
            prepare_device("cuda:0")
