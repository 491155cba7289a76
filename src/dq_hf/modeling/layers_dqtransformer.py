"""Blocks of the two causal stacks: attention, MLP, stack, head, and a cache that grows."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_dqtransformer import DQTransformerConfig


def precise(dtype):
    """The dtype of probabilities: float32, or float64 where all else is in it."""
    return torch.promote_types(dtype, torch.float32)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out; queries, keys and values (B, heads, L, width)."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # that of a `Window`
        weights = weights.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=precise(query.dtype)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


@dataclass(frozen=True)
class Window:
    """Where the elements of one pass stand in the caches, each image's at its own place.

    Args:
        slots: (B, L) long, in ascending order.
        end: int, behind the last slot of all images.
    """

    slots: torch.Tensor
    end: int

    @property
    def attention_mask(self):
        """(B, 1, L, end) bool: an element attends to what stands before it and to itself."""
        return torch.arange(self.end, device=self.slots.device) <= self.slots[:, None, :, None]


class StreamLayer(DynamicLayer):
    """A layer of transformers' cache with room for whole streams, so that nothing is copied when it grows."""

    def __init__(self, room):
        super().__init__()
        self.room, self.length = room, 0

    def lazy_initialization(self, key_states, value_states):
        self.buffers = [  # zeros, because what a mask hides must be finite
            states.new_zeros(*states.shape[:2], self.room, states.shape[3]) for states in (key_states, value_states)
        ]
        self.is_initialized = True

    def get_seq_length(self):
        """Elements that it holds."""
        return self.length

    def update(self, key_states, value_states, window=None):
        """Keys and values of all elements so far, with new ones (B, heads, L, width) in the window, or behind the last."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, count = self.length, key_states.shape[2]
        self.length = first + count if window is None else window.end
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            if window is None:
                buffer.narrow(2, first, count).copy_(states)
            else:
                buffer.scatter_(2, window.slots[:, None, :, None].expand_as(states), states)
        return tuple(buffer.narrow(2, 0, self.length) for buffer in self.buffers)


class DQAttention(nn.Module):
    """Causal multi-head self-attention; q, k, v and output with bias."""

    is_causal = True
    gives_weights = False  # also where the attention implementation does not

    def __init__(self, config: DQTransformerConfig, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, window=None):
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # (B, heads, L, head_dim)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, window)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        if weights is None and self.gives_weights:
            weights = causal_weights(query, key, self.scaling)
        return self.o_proj(output.flatten(2)), weights


@torch.no_grad()
def causal_weights(query, key, scaling):
    """Attention weights (B, heads, L, L) of queries and keys (B, heads, L, width), without a cache."""
    behind = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(behind, -torch.inf)
    return scores.softmax(-1, dtype=precise(query.dtype)).to(query.dtype)


@contextmanager
def attention_weights(model):
    """While it lasts, all attention of a model gives its weights. What else it gives stays the same."""
    modules = [module for module in model.modules() if isinstance(module, DQAttention)]
    for module in modules:
        module.gives_weights = True
    try:
        yield
    finally:
        for module in modules:
            module.gives_weights = False


class DQMLP(nn.Module):
    """Linear to four times the width, GELU (erf), linear back."""

    def __init__(self, config: DQTransformerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.fc2 = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.fc2(nn.functional.gelu(self.fc1(hidden_states)))


class DQTransformerLayer(GradientCheckpointingLayer):
    """Pre-LayerNorm attention and MLP, each with a residual connection."""

    def __init__(self, config: DQTransformerConfig, layer_idx):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.attention = DQAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.mlp = DQMLP(config)
        self.residual_dropout = config.residual_dropout

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, window=None):
        attended, _ = self.attention(self.input_layernorm(hidden_states), attention_mask, past_key_values, window)
        hidden_states = hidden_states + self.drop_out(attended)
        return hidden_states + self.drop_out(self.mlp(self.post_attention_layernorm(hidden_states)))

    def drop_out(self, hidden_states):
        """In training mode, some of it set to zero."""
        return nn.functional.dropout(hidden_states, self.residual_dropout) if self.training else hidden_states


class DQStack(nn.Module):
    """One of the two causal stacks; no final norm."""

    def __init__(self, config: DQTransformerConfig, num_layers):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DQTransformerLayer(config, i) for i in range(num_layers))

    def forward(self, hidden_states, past_key_values=None, window=None):
        """(B, L, width) to (B, L, width); with a cache they are the elements in the window, or behind those that it holds."""
        attention_mask = None  # one element attends to all that a cache which grows holds
        if window is not None:
            attention_mask = window.attention_mask
        # A cache that can be compiled has room behind the last element.
        elif past_key_values is None or past_key_values.is_compileable or hidden_states.shape[1] > 1:
            attention_mask = create_causal_mask(
                self.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=past_key_values
            )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, past_key_values, window)
        return hidden_states


class DQHead(nn.Module):
    """LayerNorm and a linear layer without bias, to logits."""

    def __init__(self, config: DQTransformerConfig, vocab_size):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.projection = nn.Linear(config.hidden_size, vocab_size, bias=False)

    def forward(self, hidden_states):
        return self.projection(self.norm(hidden_states))


def make_cache(num_layers, room, compileable=False):
    """A cache for one stack with room for so many elements; a compileable one is always attended to as a whole."""
    return Cache(layers=[StaticLayer(room) if compileable else StreamLayer(room) for _ in range(num_layers)])
