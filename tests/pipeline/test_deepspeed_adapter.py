"""The private parts of DeepSpeed behave as the adapter expects; verified with deepspeed 0.19.8."""

from importlib.metadata import requires, version

import deepspeed
import pytest
import torch
from deepspeed.ops.op_builder import builder
from evspan.conf.schema.training import DeepSpeedConfig, TrainConfig
from evspan.pipeline.engine import deepspeed_adapter as adapter
from evspan.pipeline.engine.deepspeed_engine import engine_config
from packaging.requirements import Requirement
from support.one_rank import open_one_rank
from torch import nn

LR = 0.1


@pytest.fixture(scope="module")
def one_rank():
    with open_one_rank() as world:
        yield world


class Setup:
    """A linear layer of 3 x 2 weights under DeepSpeed, with two micro-batches per update."""

    def __init__(self, stage, precision="fp32"):
        torch.manual_seed(0)
        self.stage = stage
        self.model = nn.Linear(2, 3)
        self.initial = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 9},
            "bf16": {"enabled": precision == "bf16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        device = torch.device("cpu")
        self.engine = adapter.initialize(self.model, self.adam, config, device)
        self.updated = adapter.adam_parameters(self.engine, self.adam, stage=stage)
        for parameter in self.updated:
            self.adam.state[parameter].update(
                step=torch.tensor(0.0),
                exp_avg=torch.zeros_like(parameter.data),
                exp_avg_sq=torch.zeros_like(parameter.data),
            )
        adapter.link_adam_state(self.engine, stage=stage)

    def whole(self, name, key=None):
        parameter = self.parameter(name)
        part = adapter.read_part(parameter, key, stage=self.stage, rank=0)
        shape = adapter.whole_shape(parameter, stage=self.stage)
        assert part.start == 0
        size = adapter.padded_numel(parameter, stage=self.stage, ranks=1)
        assert part.values.numel() == size >= shape.numel()
        return part.values[: shape.numel()].view(shape)

    def parameter(self, name):
        return dict(self.engine.module.named_parameters())[name]


@pytest.fixture
def setup(one_rank):
    made = []

    def build(*args, **kwargs):
        made.append(Setup(*args, **kwargs))
        return made[-1]

    yield build
    for each in made:
        each.engine.destroy()


def test_the_verified_version_and_the_installed_one_are_in_the_declared_range():
    declared = [Requirement(line) for line in requires("evspan")]
    (requirement,) = [each for each in declared if each.name == "deepspeed"]
    assert requirement.specifier.contains(adapter.VERIFIED_VERSION)
    assert requirement.specifier.contains(version("deepspeed"))


def test_no_compiled_operator_is_looked_for(setup, monkeypatch):
    def probe(builder):
        raise AssertionError(f"{builder.NAME} was probed")

    monkeypatch.setattr(builder, "probe_is_compatible", probe)
    setup(0)
    assert {"deepspeed_shm_comm", "fused_adam"} <= deepspeed.ops.__compatible_ops__.keys()
    assert not any(deepspeed.ops.__compatible_ops__.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parts_are_the_float32_weights_and_what_is_written_is_read(setup, stage):
    setup = setup(stage)
    for name, initial in setup.initial.items():
        assert torch.equal(setup.whole(name), initial)
        assert not setup.whole(name, "exp_avg").any()
        for number, key in enumerate((None, "exp_avg", "exp_avg_sq")):
            values = torch.arange(initial.numel()).view(initial.shape) + 10.0 * number
            adapter.write_whole(setup.parameter(name), key, values, stage=stage, rank=0)
            assert torch.equal(setup.whole(name, key), values)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adam_updates_the_parameters_that_the_adapter_names(setup, stage):
    setup = setup(stage)
    before = [parameter.detach().clone() for parameter in setup.updated]
    for _ in range(2):
        setup.engine.backward(setup.engine(torch.ones(1, 2)).sum())
        setup.engine.step()
    assert sum(parameter.numel() for parameter in setup.updated) >= 9
    for parameter, old in zip(setup.updated, before, strict=True):
        # Adam's first step is the learning rate against the sign of the gradient, here ones.
        moved = (old - parameter.detach()).flatten()[:3]
        torch.testing.assert_close(moved, torch.full_like(moved, LR))
        assert int(setup.adam.state[parameter]["step"]) == 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_full_gradients_are_those_of_the_loss(setup, stage):
    setup = setup(stage)
    for values in ([0.0, 0.0], [3.0, 5.0]):
        setup.engine.backward(setup.engine(torch.tensor([values])).sum())
        if not setup.engine.is_gradient_accumulation_boundary():
            setup.engine.step()
    gradient = adapter.full_gradient(setup.parameter("weight"))
    expected = torch.tensor([[3.0, 5.0]] * 3) / 2  # averaged over the accumulation
    torch.testing.assert_close(gradient.float(), expected)


@pytest.mark.parametrize(("stage", "write"), [(3, False), (3, True), (1, True)])
def test_whole_parameters_are_whole(setup, stage, write):
    setup = setup(stage)
    parameter = setup.parameter("weight")
    with adapter.whole_parameters([parameter], stage=stage, write=write):
        assert parameter.shape == (3, 2)
        if write:
            parameter.data.fill_(7.0)
    with adapter.whole_parameters([parameter], stage=stage):
        assert bool((parameter == 7.0).all()) == write


@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("parameters", [False, True])
def test_only_what_the_config_names_is_offloaded(optimizer, parameters):
    config = TrainConfig(
        deepspeed=DeepSpeedConfig(
            stage=3, offload_optimizer=optimizer, offload_parameters=parameters
        )
    )
    zero = engine_config(config, 2, 100)["zero_optimization"]
    assert zero["stage"] == 3
    assert zero.get("offload_optimizer") == ({"device": "cpu"} if optimizer else None)
    assert zero.get("offload_param") == ({"device": "cpu"} if parameters else None)
