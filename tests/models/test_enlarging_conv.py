"""EnlargingConv2d against what defines it: nearest enlargement by two, then a 3x3 convolution."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from gpstoken_diffusers.models.enlarging_conv import EnlargingConv2d

# Sums of at most 9 * 17 products in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def same_weights_in_every_run():
    torch.manual_seed(0)


def definition(conv, x):
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), conv.weight, conv.bias, padding=1)


def inputs(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (1, 17), (17, 1), (6, 9), (16, 16)])
@pytest.mark.parametrize("channels", [(1, 1), (17, 5), (8, 32)])
def test_it_is_the_convolution_of_the_enlarged_map(channels, size, memory_format):
    conv = EnlargingConv2d(*channels)
    x = inputs(2, channels[0], *size)
    laid_out = x.contiguous(memory_format=memory_format)
    parts = [x, conv.weight, conv.bias]
    ours, plain = conv(laid_out), definition(conv, x)
    torch.testing.assert_close(ours, plain, **TOLERANCE)
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    gradients = zip(torch.autograd.grad((ours * weights).sum(), parts),
                    torch.autograd.grad((plain * weights).sum(), parts), strict=True)  # fmt: skip
    for own, expected in gradients:
        # Up to 2 * 32 * 32 products in a sum, of size 1.
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=2e-4)


def test_maps_that_are_no_block_of_memory():
    conv = EnlargingConv2d(4, 4)
    x = inputs(1, 8, 12, 20)[:, ::2, 1::3, 3:12]
    torch.testing.assert_close(conv(x), definition(conv, x), **TOLERANCE)


def test_an_empty_batch_stays_empty():
    assert EnlargingConv2d(4, 6)(torch.zeros(0, 4, 5, 7)).shape == (0, 6, 10, 14)


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_short_floats_round_once_more(dtype, epsilon):
    """Sums of weights and the result are rounded, each by at most half an epsilon of itself."""
    conv = EnlargingConv2d(64, 32).to(dtype)
    x = inputs(1, 64, 16, 16, dtype=dtype)
    ours = conv(x)
    exact = definition(conv.float(), x.float())
    assert ours.dtype == dtype
    assert ((ours.float() - exact).std() / exact.std()).item() < epsilon


def test_it_starts_and_is_saved_as_conv2d():
    torch.manual_seed(5)
    ours = EnlargingConv2d(6, 8)
    torch.manual_seed(5)
    theirs = torch.nn.Conv2d(6, 8, 3, padding=1)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)


def test_changed_weights_are_used_at_once():
    conv, x = EnlargingConv2d(3, 3), inputs(1, 3, 4, 4)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(2.0)
    torch.testing.assert_close(conv(x) - conv.bias[:, None, None], 2 * (before - conv.bias[:, None, None]), **TOLERANCE)


def test_it_compiles_without_a_break():
    conv, x = EnlargingConv2d(3, 5), inputs(1, 3, 4, 6)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), definition(conv, x), **TOLERANCE)


def test_four_products_for_each_nine():
    conv, x = EnlargingConv2d(32, 32), inputs(1, 32, 64, 64)
    counts = []
    for run in (conv, lambda x: definition(conv, x)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(x)
        counts.append(counter.get_total_flops())
    sums_of_weights = 2 * 32 * 32 * 9 * 16
    assert (counts[0] - sums_of_weights) * 9 == counts[1] * 4


def test_an_adapter_for_convolutions_is_refused_before_it_could_be_ignored():
    class Holder(ModelMixin, ConfigMixin, PeftAdapterMixin):
        @register_to_config
        def __init__(self):
            super().__init__()
            self.conv_up = EnlargingConv2d(4, 4)

    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="EnlargingConv2d.* is not supported"):
        Holder().add_adapter(peft.LoraConfig(r=2, target_modules=["conv_up"]))
