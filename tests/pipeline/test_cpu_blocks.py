"""The cache-sized blocks against the same layers in plain operators."""

import copy

import pytest
import torch
import torch.nn.functional as F
from evspan.conf.schema.training import BackboneConfig
from evspan.pipeline.model import cpu_blocks
from evspan.pipeline.model.backbone import PartitionAttention
from torch import nn

ROWS, COLUMNS = 6, 10  # more positions than SMALL_WINDOW: attention is supported as well


def a_block(dim=16, *, grid=False, first_norm=True, dim_head=8):
    torch.manual_seed(0)
    block = PartitionAttention(
        dim, BackboneConfig(embed_dim=dim, dim_head=dim_head), grid=grid, first_norm=first_norm
    )
    for name, parameter in block.named_parameters():
        if "weight" not in name or "norm" in name:  # those that start as constants
            nn.init.uniform_(parameter, -1, 1)
    return block


def output_and_gradients(block, x, partition):
    x = x.clone().requires_grad_()
    y = block(x, partition)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *block.parameters()])]


def assert_agrees(block, x, partition):
    """float32, which the blocks support, against double, which they do not."""
    assert cpu_blocks.is_supported(x)
    expected = output_and_gradients(copy.deepcopy(block).double(), x.double(), partition)
    for actual, exact in zip(output_and_gradients(block, x, partition), expected, strict=True):
        assert (actual - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("grid", [False, True], ids=["windows", "grids"])
@pytest.mark.parametrize("first_norm", [False, True], ids=["as it is", "normalised"])
@pytest.mark.parametrize(
    "partition", [(ROWS, COLUMNS), (2, 5)], ids=["60 positions", "10 positions"]
)
@pytest.mark.parametrize("at_once", [1, 2**14, 2**30], ids=["a band", "some", "all"])
def test_blocks_agree_with_plain_layers(grid, first_norm, partition, at_once, monkeypatch):
    monkeypatch.setattr(cpu_blocks, "CACHE_BYTES", at_once)
    block, (rows, columns) = a_block(grid=grid, first_norm=first_norm), partition
    assert_agrees(block, torch.randn(5, 3 * rows, 2 * columns, 16), partition)


@pytest.mark.parametrize("bands", [1, 2, 3, 7])
@pytest.mark.parametrize("grid", [False, True], ids=["windows", "grids"])
def test_any_number_of_bands_at_once(bands, grid, monkeypatch):
    """3 bands a frame: parts of a frame, with a shorter last one, and several frames."""
    monkeypatch.setattr(cpu_blocks, "CACHE_BYTES", bands * 2 * ROWS * COLUMNS * 3 * 16 * 4)
    assert_agrees(a_block(grid=grid), torch.randn(5, 3 * ROWS, 2 * COLUMNS, 16), (ROWS, COLUMNS))


@pytest.mark.parametrize("heads", [1, 4])
def test_any_number_of_heads(heads):
    assert_agrees(a_block(dim_head=16 // heads), torch.randn(2, ROWS, COLUMNS, 16), (ROWS, COLUMNS))


@pytest.mark.parametrize("at_once", [1, 2**16, 2**30])
def test_what_a_wide_mlp_stores_is_what_a_narrow_one_recomputes(at_once, monkeypatch):
    monkeypatch.setattr(cpu_blocks, "CACHE_BYTES", at_once)
    block, x = a_block(), torch.randn(2, 4, 10, 16)
    narrow = output_and_gradients(block, x, (2, 5))
    monkeypatch.setattr(cpu_blocks, "WIDE", 16)
    for actual, expected in zip(output_and_gradients(block, x, (2, 5)), narrow, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert_agrees(block, x, (2, 5))


def test_scores_too_large_for_exp():
    block = a_block()
    with torch.no_grad():
        block.self_attn.qkv.weight *= 100
    for partition in ((ROWS, COLUMNS), (2, 5)):
        assert all(
            t.isfinite().all()
            for t in output_and_gradients(block, torch.randn(1, 6, 10, 16), partition)
        )


def test_no_frames():
    y, dx, *gradients = output_and_gradients(a_block(), torch.zeros(0, 12, 20, 16), (ROWS, COLUMNS))
    assert y.shape == dx.shape == (0, 12, 20, 16)
    assert not any(g.any() for g in gradients)


def test_backward_twice_and_a_gradient_that_is_not_contiguous():
    block, x = a_block(), torch.randn(2, 12, 20, 16, requires_grad=True)
    y, weights = block(x, (ROWS, COLUMNS)), torch.randn(16, 20, 12, 2)
    inputs = [x, *block.parameters()]
    once = torch.autograd.grad(y, inputs, weights.permute(3, 2, 1, 0), retain_graph=True)
    for a, b in zip(
        once, torch.autograd.grad(y, inputs, weights.permute(3, 2, 1, 0).contiguous()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_x_stays_as_it_is_and_no_graph_gives_the_same():
    block, x = a_block(), torch.randn(2, 12, 20, 16)
    before, expected = x.clone(), block(x, (ROWS, COLUMNS))
    with torch.no_grad():
        assert torch.equal(block(x, (ROWS, COLUMNS)), expected)
        assert torch.equal(x, before)


def test_half_precision_and_double_are_not_supported():
    x = torch.zeros(1, 2, 2, 8)
    assert cpu_blocks.is_supported(x)
    assert not any(
        cpu_blocks.is_supported(x.to(t)) for t in (torch.bfloat16, torch.float16, torch.double)
    )
    assert not cpu_blocks.is_supported(x.to("meta"))


def test_the_definition_by_hand():
    """LayerNorm, MLP and sum with torch's own layers."""
    block, x = a_block(first_norm=False), torch.randn(3, 2, 5, 16)
    first, second = block.mlp.layers()
    actual = cpu_blocks.mlp_block(x, block.norm2, first, block.ls2.after(second))
    expected = (
        x
        + block.mlp.net(F.layer_norm(x, (16,), block.norm2.weight, block.norm2.bias))
        * block.ls2.gamma
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
