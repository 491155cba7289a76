"""DQ-Transformer: generates variable-length codes from coarse to fine (paper section 3.2, figure 4).

The Position-Transformer says where the next code goes, the Content-Transformer which code it is.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, CompileConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .configuration_dqtransformer import DQTransformerConfig
from .hub_dq import HubMixin
from .modeling_utils_dq import StrictLoadingMixin, check_indices
from .sampling_dq import choose, guide, in_evaluation_mode, make_warpers, random_streams, with_guidance_rows
from .sequence_dq import DQStream, StreamLayout, StreamState


@dataclass
class DQTransformerOutput(ModelOutput):
    """What `DQTransformerForImageGeneration.forward` gives; L is the longest stream's length.

    Args:
        loss: scalar, content_loss_weight * content_loss + position_loss_weight * position_loss.
        content_loss: scalar, cross-entropy in nats, mean over all targets.
        position_loss: scalar, mean of the granularities' position losses.
        coarse_position_loss: scalar, mean over the targets of the coarsest granularity.
        fine_position_loss: scalar, mean over the targets of the finest granularity, its start token included.
        position_losses: (K,), of every granularity, coarsest first.
        content_logits: (B, L-1, content vocabulary), element i predicts the content of element i+1.
        position_logits: (B, L-1, fine position vocabulary), likewise its position.
        stream: the streams that the logits belong to.
    """

    loss: torch.Tensor | None = None
    content_loss: torch.Tensor | None = None
    position_loss: torch.Tensor | None = None
    coarse_position_loss: torch.Tensor | None = None
    fine_position_loss: torch.Tensor | None = None
    position_losses: torch.Tensor | None = None
    content_logits: torch.Tensor | None = None
    position_logits: torch.Tensor | None = None
    stream: DQStream | None = None


@dataclass
class DQGenerationOutput(ModelOutput):
    """What `DQTransformerForImageGeneration.generate` gives; L is the longest stream's length.

    Args:
        codes: (B, H, W) long, on the finest grid.
        grain_map: (B, h, w) long, granularity of each region, 0 = coarsest.
        positions: (B, L) long, the streams, padded at the end.
        contents: (B, L) long.
        lengths: (B,) long, elements without padding.
    """

    codes: torch.Tensor | None = None
    grain_map: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    contents: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out; queries, keys and values (B, heads, L, width)."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class GrowingLayer(DynamicLayer):
    """A layer of transformers' cache whose buffers double when they are full.

    `DynamicLayer` copies all keys and values at every step, which at some hundred elements takes as long as attention.
    """

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        self.buffers = None

    def update(self, key_states, value_states, *args, **kwargs):
        """New keys and values (B, heads, L, width) to those of all elements so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.get_seq_length()
        end = first + key_states.shape[2]
        if self.buffers is None or end > self.buffers[0].shape[2]:
            old = (self.keys, self.values)
            shapes = [(*states.shape[:2], 2 * end, states.shape[3]) for states in (key_states, value_states)]
            self.buffers = [key_states.new_empty(shape) for shape in shapes]
            for buffer, states in zip(self.buffers, old):
                if first > 0:
                    buffer[:, :, :first] = states
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, first:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


class DQAttention(nn.Module):
    """Causal multi-head self-attention; q, k, v and output with bias."""

    is_causal = True

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

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # (B, heads, L, head_dim)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        return self.o_proj(output.flatten(2))


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
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        attended = self.attention(self.input_layernorm(hidden_states), attention_mask, past_key_values)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class DQStack(nn.Module):
    """One of the two causal stacks; no final norm."""

    def __init__(self, config: DQTransformerConfig, num_layers):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DQTransformerLayer(config, i) for i in range(num_layers))

    def forward(self, hidden_states, past_key_values=None):
        """(B, L, width) to (B, L, width); with a cache, L = 1: the element behind those that it holds."""
        attention_mask = None  # one element attends to all that a growing cache holds
        if past_key_values is None or past_key_values.is_compileable:  # such a cache has room behind the last element
            attention_mask = create_causal_mask(
                self.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=past_key_values
            )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, past_key_values)
        return hidden_states


class DQHead(nn.Module):
    """LayerNorm and a linear layer without bias, to logits."""

    def __init__(self, config: DQTransformerConfig, vocab_size):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.projection = nn.Linear(config.hidden_size, vocab_size, bias=False)

    def forward(self, hidden_states):
        return self.projection(self.norm(hidden_states))


class DQTransformerForImageGeneration(HubMixin, StrictLoadingMixin, PreTrainedModel):
    """The generator: Position-Transformer and Content-Transformer (arXiv 2305.11718, section 3.2).

    Differs: from the paper's two granularities to any number; from the release as `sequence_dq` says.
    """

    config_class = DQTransformerConfig
    base_model_prefix = "transformer"
    main_input_name = "codes"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["DQTransformerLayer"]

    def __init__(self, config: DQTransformerConfig):
        config.validate()
        super().__init__(config)
        self.layout = StreamLayout(config.grid_sizes, config.codebook_size, config.fine_order)
        width = config.hidden_size
        self.content_embedding = nn.Embedding(config.content_vocab_size, width)
        self.position_embeddings = nn.ModuleList(nn.Embedding(size, width) for size in config.position_vocab_sizes)
        self.stream_embedding = nn.Embedding(config.max_stream_length, width)
        self.granularity_embedding = nn.Embedding(len(config.grid_sizes), width)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.position_transformer = DQStack(config, config.num_position_layers)
        self.position_head = DQHead(config, config.position_vocab_sizes[-1])
        self.content_transformer = DQStack(config, config.num_content_layers)
        self.content_head = DQHead(config, config.content_vocab_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        """Normal with standard deviation 0.02 for linear weights and embeddings, as in GPT-2."""
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self):
        """The contents' table; FSDP asks for it."""
        return self.content_embedding

    @property
    def input_device(self):
        """Device of the contents' table; where accelerate has offloaded it, the one that it comes to when called."""
        hook = getattr(self.content_embedding, "_hf_hook", None)
        execution_device = getattr(hook, "execution_device", None)
        return self.content_embedding.weight.device if execution_device is None else execution_device

    @property
    def null_label(self):
        """Start-token label of the hidden class; exists where the configuration has class_dropout."""
        return self.config.num_classes

    def forward(self, codes, grain_map, class_labels=None) -> DQTransformerOutput:
        """Training losses, and the logits that they are made of.

        Args:
            codes: (B, H, W) integers in [0, codebook_size), on the finest grid.
            grain_map: (B, h, w) integers, granularity of each region.
            class_labels: (B,) integers, or one for all, for a class-conditional model. In training mode each image's
                is hidden with probability `class_dropout`.

        Raises:
            TypeError, ValueError: tensors of another type, shape or range; labels missing or not wanted.
        """
        stream = self.pack(codes, grain_map, class_labels)
        if self.training and self.config.class_dropout > 0:
            hide = torch.rand(len(stream.lengths), 1, device=stream.lengths.device) < self.config.class_dropout
            hidden_positions = self.hide_class_in_positions(stream.positions, stream.granularities)
            stream.contents = torch.where(hide, self.hide_class_in_contents(stream.contents), stream.contents)
            stream.positions = torch.where(hide, hidden_positions, stream.positions)

        hidden_states = self.embed(stream.contents[:, :-1], stream.positions[:, :-1], stream.granularities[:, :-1])
        hidden_states = self.position_transformer(hidden_states)
        position_logits = self.position_head(hidden_states)
        positions, granularities = stream.positions[:, 1:], stream.granularities[:, 1:]
        hidden_states = self.content_transformer(hidden_states + self.embed_positions(positions, granularities))
        content_logits = self.content_head(hidden_states)

        inside = torch.arange(positions.shape[1], device=positions.device) < stream.lengths[:, None] - 1
        content_loss = masked_cross_entropy(content_logits, stream.contents[:, 1:], inside)
        position_losses = torch.stack(
            [
                masked_cross_entropy(position_logits, positions, inside & (granularities == granularity))
                for granularity in range(len(self.config.grid_sizes))
            ]
        )
        position_loss = position_losses.mean()
        return DQTransformerOutput(
            loss=self.config.content_loss_weight * content_loss + self.config.position_loss_weight * position_loss,
            content_loss=content_loss,
            position_loss=position_loss,
            coarse_position_loss=position_losses[0],
            fine_position_loss=position_losses[-1],
            position_losses=position_losses,
            content_logits=content_logits,
            position_logits=position_logits,
            stream=stream,
        )

    def pack(self, codes, grain_map, class_labels=None) -> DQStream:
        """Streams of codes and grain map; arguments and errors as in `forward`."""
        device = self.input_device
        batch = len(codes) if isinstance(codes, torch.Tensor) else None
        codes = check_indices("codes", codes, (None, *self.config.grid_sizes[-1]), self.config.codebook_size, device)
        if batch == 0:
            raise ValueError("codes must hold at least one image, got a batch of 0")
        grain_map = check_indices(
            "grain_map", grain_map, (batch, *self.config.grid_sizes[0]), len(self.config.grid_sizes), device
        )
        return self.layout.pack(codes, grain_map, self.check_class_labels(class_labels, batch))

    def unpack(self, contents, positions, lengths):
        """Codes (B, H, W) and grain map (B, h, w) of streams (B, L), (B, L), (B,); the inverse of `pack`.

        Raises:
            TypeError, ValueError: tensors of another type, shape or range; streams that are not whole.
        """
        device = self.input_device
        shape = contents.shape if isinstance(contents, torch.Tensor) else (None, None)
        contents = check_indices("contents", contents, (None, None), self.config.content_vocab_size, device)
        positions = check_indices("positions", positions, shape, self.config.position_vocab_sizes[-1], device)
        lengths = check_indices("lengths", lengths, shape[:1], contents.shape[1] + 1, device)
        return self.layout.unpack(contents, positions, lengths)

    def check_class_labels(self, class_labels, batch):
        """Labels as (batch,) long on the model's device, or None for an unconditional model.

        Raises:
            TypeError, ValueError: labels given to an unconditional model, missing, of another shape or out of range.
        """
        if self.config.num_classes == 0:
            if class_labels is not None:
                raise ValueError("this model is unconditional (num_classes 0): leave out class_labels")
            return None
        if class_labels is None:
            raise ValueError(
                f"this model is class-conditional: give class_labels, integers in 0 ... {self.config.num_classes - 1}"
            )
        if not isinstance(class_labels, torch.Tensor):
            try:
                class_labels = torch.tensor(class_labels)
            except (TypeError, ValueError, RuntimeError):  # strings, None, ragged lists
                raise TypeError(f"class_labels must be integers, got {class_labels!r}") from None
        if class_labels.numel() == 0:
            raise ValueError("class_labels must hold at least one label, got none")
        if class_labels.dim() == 0:
            class_labels = class_labels[None]
        device = self.input_device
        labels = check_indices("class_labels", class_labels, (None,), self.config.num_classes, device)
        if len(labels) == 1 and batch is not None:
            labels = labels.expand(batch)
        if batch is not None and len(labels) != batch:
            raise ValueError(f"class_labels must hold one label or one for each of {batch} images, got {len(labels)}")
        return labels

    def embed(self, contents, positions, granularities, places=None):
        """Input of the Position-Transformer, (B, L, width), for elements at `places` (L,) of the stream, else its first."""
        if places is None:
            places = torch.arange(contents.shape[1], device=contents.device)
        return self.dropout(
            self.content_embedding(contents)
            + self.embed_positions(positions, granularities)
            + self.stream_embedding(places)
            + self.granularity_embedding(granularities)
        )

    def embed_positions(self, positions, granularities):
        """Each element's position (B, L) from its own granularity's table, (B, L, width)."""
        embedded = self.position_embeddings[-1](positions)
        for granularity, table in enumerate(self.position_embeddings[:-1]):
            coarser = table(positions.clamp(max=table.num_embeddings - 1))
            embedded = torch.where((granularities == granularity)[..., None], coarser, embedded)
        return embedded

    def hide_class_in_contents(self, contents):
        """Contents with start tokens replaced by that of the hidden class."""
        start = self.layout.content_start
        return torch.where(contents >= start, start + self.null_label, contents)

    def hide_class_in_positions(self, positions, granularities):
        """Positions with start tokens replaced by those of the hidden class."""
        start = self.layout.tables(positions.device).num_cells[granularities] + 2
        return torch.where(positions >= start, start + self.null_label, positions)

    @torch.no_grad()
    @in_evaluation_mode
    def generate(
        self,
        class_labels=None,
        num_images=None,
        do_sample=True,
        temperature=None,
        top_k=None,
        top_p=None,
        position_temperature=None,
        position_top_k=None,
        position_top_p=None,
        guidance_scale=None,
        fine_positions="fixed",
        generator=None,
        on_step_end=None,
        compile_config=None,
    ) -> DQGenerationOutput:
        """Sample codes from coarse to fine, one element of every image a step; without dropout in any mode.

        Args:
            class_labels: one integer, or one for each image; None for an unconditional model.
            num_images: images in all. Default: as many as class_labels, or 1.
            do_sample: False takes the largest logit at every step (greedy); temperatures, top-k and top-p then
                would change nothing and are refused.
            temperature, top_k, top_p: for contents; above 0; at least 1 (as many as there are codes or more: no
                restriction); in (0, 1]. None: the configuration's `sampling_defaults`, and where they say nothing
                1.0, no restriction, 1.0. The same goes for the next four.
            position_temperature, position_top_k, position_top_p: the same for positions.
            guidance_scale: 1: none; above 1: logits are moved away from those of the hidden class
                (classifier-free guidance). Needs a model trained with class_dropout.
            fine_positions: "fixed" (the finest codes fill what is left, in the training order) or "free" (drawn).
            generator: one `torch.Generator`, from which image i takes the i-th draw, or a list of one for each image.
                The draw seeds the image's own random stream, so that its result depends on nothing else. Default:
                torch's global generator.
            on_step_end: called with (step, number of steps at most, `StreamState`) after every step.
            compile_config: a `transformers.CompileConfig` compiles the step, once for each batch size and setting; the
                caches then have room for the longest stream from the start. None: nothing is compiled.

        Raises:
            TypeError, ValueError: arguments of another type or range.
        """
        labels = self._prepare_labels(class_labels, num_images)
        if guidance_scale is None:
            guidance_scale = self.config.sampling_defaults.get("guidance_scale", 1.0)
        self._check_guidance(guidance_scale)
        defaults = self.config.sampling_defaults if do_sample else {}
        content_warpers = make_warpers("", temperature, top_k, top_p, defaults, do_sample)
        position_warpers = make_warpers(
            "position_", position_temperature, position_top_k, position_top_p, defaults, do_sample
        )
        if fine_positions not in ("fixed", "free"):
            raise ValueError(f'fine_positions must be "fixed" or "free", got {fine_positions!r}')
        step = compiled_step = self.generation_step
        if compile_config is not None:
            self._check_compile_config(compile_config)
            compiled_step = torch.compile(step, **compile_config.to_dict())
        longest_stream = self.config.longest_stream
        places = torch.arange(longest_stream, device=labels.device)
        uniforms = [(None, None)] * longest_stream
        if do_sample:
            uniforms = random_streams(generator, len(labels), longest_stream).to(labels.device)  # (steps, 2, B)

        state = StreamState(
            self.layout,
            position_vocab_size=self.config.position_vocab_sizes[-1],
            content_vocab_size=self.config.content_vocab_size,
            labels=labels,
            fixed_fine_positions=fine_positions == "fixed",
        )
        positions = state.allowed_positions().long().argmax(1)  # the start token, allowed alone
        state.append(positions, state.allowed_contents(positions).long().argmax(1))
        elements = [state.last]
        caches = [
            make_cache(num_layers, None if compile_config is None else longest_stream)
            for num_layers in (self.config.num_position_layers, self.config.num_content_layers)
        ]
        warpers = (position_warpers, content_warpers)
        for i in range(1, longest_stream):
            step(state, places[i - 1 : i], uniforms[i], caches, warpers, guidance_scale)
            step = compiled_step  # the first step is not compiled: it makes the caches' buffers
            elements.append(state.last)
            if on_step_end is not None:
                on_step_end(i, longest_stream - 1, state)
            if state.finished.all():  # the one place that waits for the device
                break
        codes, grain_map = state.grids()
        contents, positions, _ = (torch.stack(column, dim=1) for column in zip(*elements))
        return DQGenerationOutput(
            codes=codes, grain_map=grain_map, positions=positions, contents=contents, lengths=state.lengths
        )

    def generation_step(self, state, place, uniforms, caches, warpers, guidance_scale):
        """Draw the element behind `state.last`: its position, then its content.

        Args:
            state: `StreamState`, to which the element is appended.
            place: (1,) long, place of `state.last` in the streams.
            uniforms: (2, B) float64 in [0, 1), for position and content; (None, None) for the largest logits.
            caches: of the Position- and the Content-Transformer.
            warpers: of positions and contents.
            guidance_scale: as in `generate`.
        """
        guided = guidance_scale != 1
        contents, positions, granularity = state.last
        hidden_states = self.embed(
            with_guidance_rows(guided, contents, self.hide_class_in_contents(contents)),
            with_guidance_rows(guided, positions, self.hide_class_in_positions(positions, granularity)),
            with_guidance_rows(guided, granularity, granularity),
            place,
        )
        hidden_states = self.position_transformer(hidden_states, caches[0])
        logits = guide(self.position_head(hidden_states[:, -1]), guidance_scale)
        granularity = state.granularity
        positions = choose(logits, state.allowed_positions(), warpers[0], uniforms[0])

        hidden_states = hidden_states + self.embed_positions(
            with_guidance_rows(guided, positions, self.hide_class_in_positions(positions, granularity)),
            with_guidance_rows(guided, granularity, granularity),
        )
        hidden_states = self.content_transformer(hidden_states, caches[1])
        logits = guide(self.content_head(hidden_states[:, -1]), guidance_scale)
        state.append(positions, choose(logits, state.allowed_contents(positions), warpers[1], uniforms[1]))

    def _prepare_labels(self, class_labels, num_images):
        """Start-token label of each image to generate, (B,) long."""
        if num_images is not None and (isinstance(num_images, bool) or not isinstance(num_images, int)):
            raise TypeError(f"num_images must be a whole number, got {num_images!r}")
        if num_images is not None and num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        labels = self.check_class_labels(class_labels, num_images)
        if labels is None:
            return torch.zeros(num_images or 1, dtype=torch.long, device=self.input_device)
        return labels

    def _check_guidance(self, guidance_scale):
        """Refuse a scale that is no number, out of range, or that the model was not trained for."""
        if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, (int, float)):
            raise TypeError(f"guidance_scale must be a number, got {guidance_scale!r}")
        if not 0 <= guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be finite and 0 or more, got {guidance_scale}")
        if guidance_scale != 1 and self.config.class_dropout == 0:
            raise ValueError(
                "guidance_scale other than 1 needs a model trained with class_dropout; this one has class_dropout 0"
            )

    def _check_compile_config(self, compile_config):
        """Refuse another type, and attention that has no mask for a cache with room behind the last element."""
        if not isinstance(compile_config, CompileConfig):
            raise TypeError(f"compile_config must be a transformers.CompileConfig, got {compile_config!r}")
        if "flash" in self.config._attn_implementation:
            raise ValueError(
                f"compile_config does not work with attn_implementation {self.config._attn_implementation!r}; "
                'load the model with "sdpa"'
            )


def make_cache(num_layers, max_length=None):
    """A cache for one stack that grows, or one whose shapes are fixed, as compiling needs, with room for `max_length`."""
    if max_length is None:
        return Cache(layer_class_to_replicate=GrowingLayer)
    return Cache(layers=[StaticLayer(max_cache_len=max_length) for _ in range(num_layers)])


def masked_cross_entropy(logits, targets, mask):
    """Mean cross-entropy in nats over the targets (B, L) where the mask is true; 0 if it is nowhere."""
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    weights = mask.flatten().to(losses.dtype)
    return (losses * weights).sum() / weights.sum().clamp(min=1)
