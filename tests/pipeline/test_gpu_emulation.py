"""The emulated GPU refuses what a GPU refuses, counts what it is asked; its values are exact."""

import pytest
import torch
import torch.distributed as dist
from support.emulated_device import emulated_gpu, is_supported
from torch import nn

pytestmark = pytest.mark.skipif(not is_supported(), reason="torch before 2.9")


def test_tensors_of_two_devices_raise_with_their_shapes():
    with emulated_gpu() as gpu:
        on_gpu = torch.ones(2, 3, device=gpu.device)
        with pytest.raises(RuntimeError, match=r"aten::add has tensors on cuda:0 and .*\(3,\)\]"):
            on_gpu + torch.ones(3)
        assert (on_gpu + torch.tensor(2.0)).tolist() == [[3.0] * 3] * 2  # a CPU scalar is allowed


def test_what_makes_the_host_wait_is_counted():
    with emulated_gpu() as gpu:
        x = torch.arange(4.0, device=gpu.device)
        cases = {
            "item": lambda: x[1].item(),
            "tolist": lambda: x.tolist(),
            "to the host": lambda: x.cpu(),
            "from the host": lambda: torch.ones(3).to(gpu.device),
            "new_tensor": lambda: x.new_tensor([1, 2]),
            "mask": lambda: x[x > 1],
            "nonzero": lambda: x.nonzero(),
            "condition": lambda: bool(x.sum() > 0),
        }
        for name, run in cases.items():
            with gpu.counting() as counts:
                run()
            assert counts.waits.total() == 1, (name, counts.waits)
        with gpu.counting() as counts:
            pinned = torch.ones(3).pin_memory().to(gpu.device, non_blocking=True)
            torch.where(pinned > 0, pinned, 0).sum().to("cpu", non_blocking=True)
        assert not counts.waits
        assert [(c.direction, c.num_bytes, c.pinned) for c in counts.copies] == [
            ("H2D", 12, True),
            ("D2H", 4, True),
        ]


def test_an_event_of_an_earlier_step_is_no_wait():
    with emulated_gpu() as gpu:
        event = torch.cuda.Event()
        with gpu.counting() as counts:
            event.record()
            event.synchronize()
        assert counts.waits.total() == 1
        with gpu.counting() as counts:
            event.synchronize()
        assert not counts.waits


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
def test_training_has_the_values_of_the_cpu(options):
    x = torch.randn(2, 3, 8, 8)
    expected = network()
    reference = torch.optim.AdamW(expected.parameters(), lr=0.1, **options)
    with emulated_gpu() as gpu:
        model = network().to(gpu.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        for _ in range(3):
            for net, steps, batch in (
                (expected, reference, x),
                (model, optimizer, x.to(gpu.device)),
            ):
                steps.zero_grad()
                net(batch).square().sum().backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                steps.step()
        for name, parameter in model.state_dict().items():
            torch.testing.assert_close(parameter.cpu(), expected.state_dict()[name])


def test_kernels_of_the_gpu_have_the_values_and_gradients_of_the_cpu():
    torch.manual_seed(0)
    x = torch.randn(5, 6, 4)
    weights = [torch.randn(12, 4), torch.randn(12, 3), torch.randn(12), torch.randn(12)]
    state = [torch.randn(1, 6, 3), torch.randn(1, 6, 3)]

    def run(x, state, weights):
        leaves = [t.requires_grad_() for t in (x, *state, *weights)]
        y, h, c = torch.lstm(leaves[0], leaves[1:3], leaves[3:], True, 1, 0.0, True, False, False)
        attended = nn.functional.scaled_dot_product_attention(y, y, y)
        loss = attended.square().sum() + h.sum() + c.square().sum()
        return loss, torch.autograd.grad(loss, leaves)

    copies = [x.clone(), [t.clone() for t in state], [t.clone() for t in weights]]
    expected, expected_gradients = run(*copies)
    with emulated_gpu() as gpu:
        moved = [x.to(gpu.device), *([t.to(gpu.device) for t in part] for part in (state, weights))]
        with gpu.counting() as counts:
            loss, gradients = run(*moved)
        torch.testing.assert_close(loss.cpu(), expected)
        for gradient, of_cpu in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient.cpu(), of_cpu)
    assert counts.lstm_steps == 5
    assert counts.operators["aten::lstm"] == counts.operators["aten::lstm_backward"] == 1


def test_collectives_have_peers_with_this_rank_s_values():
    with emulated_gpu(world=4, rank=2) as gpu, gpu.counting() as counts:
        own = torch.arange(3.0, device=gpu.device)
        parts = [torch.empty_like(own) for _ in range(4)]
        dist.all_gather(parts, own)
        gathered = torch.empty(12, device=gpu.device)
        dist.all_gather_into_tensor(gathered, own)
        dist.all_reduce(own)
        assert not counts.waits
        assert [p.tolist() for p in parts] == [[0, 1, 2]] * 4
        assert gathered.tolist() == [0, 1, 2] * 4
    names = [c.name for c in counts.collectives]
    assert names == ["c10d::allgather_", "c10d::_allgather_base_", "c10d::allreduce_"]
    assert counts.operators["aten::copy_"] == 4  # of the gather into a list


def test_without_values_shapes_and_flop_are_those_of_the_computation():
    with emulated_gpu(values=False) as gpu:
        model = nn.Linear(1000, 2000).to(gpu.device)
        with gpu.counting() as counts:
            out = model(torch.ones(3000, 1000, device=gpu.device))
            out.sum().backward()
        assert out.shape == (3000, 2000)
        assert out.inner.is_meta
    forward = 2 * 3000 * 1000 * 2000
    assert counts.flop["aten::addmm"] == forward
    assert counts.flop["aten::mm"] == forward  # of the weight's gradient; x needs none
