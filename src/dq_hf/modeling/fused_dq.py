"""A stack's inference without its modules: their calls take as long as the products of a single element."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .layers_dqtransformer import DQMLP, DQAttention, DQStack, DQTransformerLayer

PLAIN = {DQStack, nn.ModuleList, DQTransformerLayer, DQAttention, DQMLP, nn.LayerNorm, nn.Linear}
REPLACED = {"forward", "_compiled_call_impl"}  # in a module's own dictionary: not what its class says


def cached_stack(stack, cache):
    """A function of hidden states (B, 1, width), or (B, L, width) and their window, that reads them with a cache.

    It gives what the stack gives, bit for bit, with its weights as they are now: by one product for queries, keys and
    values, whose weights it holds a second time, and without calls of modules. A stack that `is_plain` does not pass is
    called, and so is one with a cache that can be compiled.
    """
    if cache.is_compileable or not is_plain(stack):
        return partial(stack, past_key_values=cache)
    return partial(fused_pass, [fused(layer) for layer in stack.layers], cache)


def is_plain(stack):
    """Whether a stack only infers, with "sdpa", and nobody has put anything into it: adapters, hooks, quantised weights."""
    return (
        not stack.training
        and stack.config._attn_implementation == "sdpa"
        and all(type(parameter) is nn.Parameter for parameter in stack.parameters())
        and all(
            type(module) in PLAIN
            and not (module._forward_hooks or module._forward_pre_hooks)
            and REPLACED.isdisjoint(vars(module))
            for module in stack.modules()
        )
    )


@dataclass(frozen=True)
class FusedLayer:
    """What `fused_pass` wants of a layer.

    Args:
        head_dim, scaling: of its attention.
        norms: arguments of the two norms, behind the input.
        products: likewise of four products: queries, keys and values in one, the attention's output, both of the MLP.
    """

    head_dim: int
    scaling: float
    norms: list
    products: list


def fused(layer) -> FusedLayer:
    """A `DQTransformerLayer` without its modules."""
    attention, mlp = layer.attention, layer.mlp
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q_k_v = [torch.cat([getattr(projection, name) for projection in projections]) for name in ("weight", "bias")]
    norms, linears = (layer.input_layernorm, layer.post_attention_layernorm), (attention.o_proj, mlp.fc1, mlp.fc2)
    return FusedLayer(
        attention.head_dim,
        attention.scaling,
        norms=[(norm.normalized_shape, norm.weight, norm.bias, norm.eps) for norm in norms],
        products=[q_k_v, *((linear.weight, linear.bias) for linear in linears)],
    )


def fused_pass(layers, cache, hidden_states, window=None):
    """(B, L, width) to (B, L, width), as `DQStack.forward`."""
    layer_norm, linear = nn.functional.layer_norm, nn.functional.linear
    attention_mask = None if window is None else window.attention_mask
    for layer, layer_cache in zip(layers, cache.layers):
        (attention_norm, mlp_norm), (q_k_v, output, fc1, fc2) = layer.norms, layer.products
        projected = linear(layer_norm(hidden_states, *attention_norm), *q_k_v)
        projected = projected.view(*hidden_states.shape[:2], 3, -1, layer.head_dim)
        query, key, value = projected.transpose(1, 3).unbind(2)  # (B, heads, L, head_dim)
        key, value = layer_cache.update(key, value, window)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=layer.scaling)
        hidden_states = hidden_states + linear(attended.transpose(1, 2).flatten(2), *output)
        inner = nn.functional.gelu(linear(layer_norm(hidden_states, *mlp_norm), *fc1))
        hidden_states = hidden_states + linear(inner, *fc2)
    return hidden_states
