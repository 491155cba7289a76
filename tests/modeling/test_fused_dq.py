"""Without its modules a stack gives the same bits; and whoever has put something into it is not passed over."""

import copy

import pytest
import torch
from conftest import make_transformer, seeded
from torch import nn

from dq_hf.modeling.fused_dq import cached_stack
from dq_hf.modeling.layers_dqtransformer import Window, make_cache


@pytest.fixture
def model():
    return make_transformer(grid_sizes=[[1, 2], [2, 4]], num_classes=3, class_dropout=0.2)


def sample(model):
    return model.generate([0, 1, 2], guidance_scale=2.0, generator=seeded())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_single_elements_and_windows_are_those_of_the_modules_bit_for_bit(dtype, batch):
    torch.manual_seed(0)
    stack = make_transformer(hidden_size=24, num_attention_heads=4, num_position_layers=2).position_transformer
    stack = stack.to(dtype)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.3)
    caches = [make_cache(2, 12) for _ in range(2)]
    places = [None, None, torch.arange(2, 6).expand(batch, -1), torch.arange(3, 8) + torch.arange(batch)[:, None] % 3]
    for place in places:
        window = None if place is None else Window(place, int(place.max()) + 1)
        hidden_states = torch.randn(batch, 1 if place is None else place.shape[1], 24, dtype=dtype, generator=seeded())
        expected = stack(hidden_states, caches[0], window)
        assert torch.equal(cached_stack(stack, caches[1])(hidden_states, window=window), expected)
        for one, other in zip(*(cache.layers for cache in caches)):
            assert all(map(torch.equal, one.buffers, other.buffers))


def test_weights_that_change_between_two_calls_are_seen(model):
    sample(model)
    with torch.no_grad():
        for layer in (*model.position_transformer.layers, *model.content_transformer.layers):
            layer.attention.k_proj.weight.normal_()
    changed = copy.deepcopy(model)
    changed.set_attn_implementation("eager")  # calls the modules
    assert torch.equal(sample(model).contents, sample(changed).contents)


class Double(nn.Module):
    def forward(self, weight):
        return weight * 2


class DoubleLinear(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs * 2)


def replace_class(linear):
    linear.__class__ = DoubleLinear


def replace_forward(linear):
    forward = linear.forward
    linear.forward = lambda inputs: forward(inputs * 2)


@pytest.mark.parametrize(
    "double",
    [
        lambda linear: linear.register_forward_hook(lambda module, inputs, output: output * 2),
        lambda linear: linear.register_forward_pre_hook(lambda module, inputs: inputs[0] * 2),
        lambda linear: nn.utils.parametrize.register_parametrization(linear, "weight", Double()),
        replace_class,
        replace_forward,
    ],
    ids=["hook", "hook before", "parametrization", "class", "forward"],
)
def test_what_is_put_into_a_layer_has_its_effect(model, double):
    """Twice what a product without bias gives is exactly what it gives with twice the weight."""
    linears = [
        getattr(layer.attention, name) for layer in model.content_transformer.layers for name in ("k_proj", "o_proj")
    ]
    with torch.no_grad():
        for linear in linears:
            linear.bias.zero_()
    plain = sample(model)
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        for layer in doubled.content_transformer.layers:
            layer.attention.k_proj.weight.mul_(2)
            layer.attention.o_proj.weight.mul_(2)
    for linear in linears:
        double(linear)
    assert torch.equal(sample(model).contents, sample(doubled).contents)
    assert not torch.equal(sample(model).contents, plain.contents)


@torch.no_grad()
def test_a_hook_on_any_module_is_called_at_every_element(model):
    stack, calls = model.position_transformer, []
    for module in stack.modules():
        if not isinstance(module, nn.ModuleList):
            handle = module.register_forward_hook(lambda *_: calls.append(1))
            read = cached_stack(stack, make_cache(len(stack.layers), 3))
            for _ in range(3):
                read(torch.zeros(1, 1, model.config.hidden_size))
            handle.remove()
            assert len(calls) == 3, module
            calls.clear()
