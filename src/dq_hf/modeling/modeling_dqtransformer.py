"""DQ-Transformer: generates variable-length codes from coarse to fine (paper section 3.2, figure 4).

The Position-Transformer says where the next code goes, the Content-Transformer which code it is.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .conditioning_dq import Condition, TextPrefix, class_condition
from .configuration_dqtransformer import DQTransformerConfig
from .constraints_dq import StreamState
from .generation_dq import DQSamplingMixin
from .grain_map_dq import check_cells
from .hub_dq import HubMixin
from .known_dq import KnownState
from .layers_dqtransformer import DQAttention, DQHead, DQStack, DQTransformerLayer, attention_weights, precise
from .modeling_utils_dq import TorchInitMixin, call_device, check_indices
from .sequence_dq import DQStream, StreamLayout, target_masks


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
        hidden_states: on request, a tuple of (B, T+L-1, width), T the text's slots: the input of the Position-Transformer,
            and what each layer gives, those of the Position-Transformer first.
        attentions: on request, a tuple of (B, heads, T+L-1, T+L-1), the weights of each layer.
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
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DQLogProbOutput(ModelOutput):
    """What `DQTransformerForImageGeneration.log_prob` gives; L is the longest stream's length.

    Args:
        position_log_probs: (B, L) float, nats, at most 0: of each element's position given all elements before it.
        content_log_probs: (B, L) float, of its content given its position, too. What is forced has 0 in both, and
            so has padding.
        stream: the streams.
    """

    position_log_probs: torch.Tensor | None = None
    content_log_probs: torch.Tensor | None = None
    stream: DQStream | None = None

    @property
    def nats(self):
        """Code length (B,) of each image; divided by ln 2, in bits."""
        return -(self.position_log_probs + self.content_log_probs).sum(1)


class DQTransformerForImageGeneration(HubMixin, TorchInitMixin, DQSamplingMixin, PreTrainedModel):
    """The generator: Position-Transformer and Content-Transformer (arXiv 2305.11718, section 3.2).

    Differs from the paper in any number of granularities instead of two.
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
    _can_record_outputs = {"hidden_states": DQTransformerLayer, "attentions": OutputRecorder(DQAttention, index=1)}
    _input_embed_layer = "content_embedding"  # FSDP asks for it

    def __init__(self, config: DQTransformerConfig):
        config.validate()
        super().__init__(config)
        self.layout = StreamLayout(config.grid_sizes, config.codebook_size, config.fine_order, config.num_start_tokens)
        width = config.hidden_size
        self.text_prefix = TextPrefix(config) if config.text_length is not None else None
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

    @property
    def input_device(self):
        """Device of the contents' table; where accelerate has offloaded it, the one that it comes to when called."""
        return call_device(self.content_embedding)

    @capture_outputs
    def forward(
        self,
        codes,
        grain_map,
        class_labels=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        return_loss=True,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ) -> DQTransformerOutput:
        """Training losses, and the logits that they are made of.

        Args:
            codes: (B, H, W) integers in [0, codebook_size), on the finest grid.
            grain_map: (B, h, w) integers, granularity of each region.
            class_labels: (B,) integers, or one for all, for a class-conditional model. In training mode each image's
                is hidden with probability `class_dropout`.
            encoder_hidden_states: (B, T, text_hidden_size) float, of a text encoder, for a model with text; None: no
                text. In training mode each image's is hidden with probability `text_dropout`.
            encoder_attention_mask: (B, T), 0 where there is no token; None: all are there.
            return_loss: False leaves `loss` out.
            output_attentions, output_hidden_states, return_dict: as in transformers. Attention weights have a gradient
                with attn_implementation "eager" only.

        Raises:
            TypeError, ValueError: tensors of another type, shape or range; labels missing or not wanted.
        """
        codes, grain_map = self.check_codes(codes, grain_map)
        condition = self.condition(class_labels, len(codes), encoder_hidden_states, encoder_attention_mask)
        if self.training:
            condition = self.hide_at_random(condition)
        stream = self.layout.pack(codes, grain_map, condition.labels)
        with attention_weights(self) if output_attentions else nullcontext():
            position_logits, content_logits = self.logits(stream, condition)

        inside, *of_granularity = target_masks(stream, len(self.config.grid_sizes))
        content_loss = masked_cross_entropy(content_logits, stream.contents[:, 1:], inside)
        position_losses = torch.stack(
            [masked_cross_entropy(position_logits, stream.positions[:, 1:], mask) for mask in of_granularity]
        )
        position_loss = position_losses.mean()
        loss = self.config.content_loss_weight * content_loss + self.config.position_loss_weight * position_loss
        return DQTransformerOutput(
            loss=loss if return_loss else None,
            content_loss=content_loss,
            position_loss=position_loss,
            coarse_position_loss=position_losses[0],
            fine_position_loss=position_losses[-1],
            position_losses=position_losses,
            content_logits=content_logits,
            position_logits=position_logits,
            stream=stream,
        )

    def logits(self, stream, condition):
        """Position and content logits (B, L-1, vocabulary): element i predicts element i+1, its content given its position."""
        elements = self.embed(stream.contents[:, :-1], stream.positions[:, :-1], stream.granularities[:, :-1])
        following = self.embed_positions(stream.positions[:, 1:], stream.granularities[:, 1:])
        first = condition.prefix_length
        if first > 0:
            elements = torch.cat([condition.prefix.to(elements.dtype), elements], dim=1)
            following = nn.functional.pad(following, (0, 0, first, 0))  # to the prefix nothing is added
        hidden_states = self.position_transformer(elements)
        position_logits = self.position_head(hidden_states[:, first:])
        hidden_states = self.content_transformer(hidden_states + following)
        return position_logits, self.content_head(hidden_states[:, first:])

    def log_prob(
        self, codes, grain_map, class_labels=None, encoder_hidden_states=None, encoder_attention_mask=None
    ) -> DQLogProbOutput:
        """Log-probability of every element of images' streams, in the training order.

        It is that of sampling among what may come, where each granularity's cells come in the training order and the
        finest ones are fixed. What is forced costs nothing: start tokens, ends that must come, the finest positions.
        No condition is hidden, and there is no guidance; dropout is on in training mode.

        Args:
            codes, grain_map, class_labels, encoder_hidden_states, encoder_attention_mask: as in `forward`.

        Raises:
            TypeError, ValueError: as in `forward`.
        """
        codes, grain_map = self.check_codes(codes, grain_map)
        condition = self.condition(class_labels, len(codes), encoder_hidden_states, encoder_attention_mask)
        stream = self.layout.pack(codes, grain_map, condition.labels)
        position_log_probs, content_log_probs = element_log_probs(self.predictions(stream, condition))
        return DQLogProbOutput(
            position_log_probs=position_log_probs, content_log_probs=content_log_probs, stream=stream
        )

    def predictions(self, stream, condition, state=None):
        """What is said of streams, one element behind the start after the other.

        Args:
            stream: `DQStream`.
            condition: `Condition`.
            state: `StreamState` at the beginning of these streams; None: in the training order, nothing known.

        Yields:
            A pair, of the element's position and of its content: logits (B, V), what is allowed (B, V) bool, and what the
            stream has (B,) long.
        """
        if state is None:
            state = StreamState(self.layout, condition.labels, ascending=True)
        position_logits, content_logits = self.logits(stream, condition)
        (start, *elements) = zip(stream.positions.unbind(1), stream.contents.unbind(1))
        state.append(*start)
        for i, (positions, contents) in enumerate(elements):
            yield (
                (state.steer(position_logits[:, i]), state.allowed_positions(), positions),
                (content_logits[:, i], state.allowed_contents(positions), contents),
            )
            state.append(positions, contents)

    def log_weights(self, state, condition):
        """Logarithms (B,) of the importance weights of finished streams of which something is known.

        A weight is a stream's probability under the model divided by the probability of drawing it given what is known
        (sequential importance sampling), both without temperatures, top-k, top-p and guidance.

        Args:
            state: `KnownState`.
            condition: `Condition`.
        """
        stream = state.stream()
        fixed = state.fixed_fine_positions
        log_probs, proposed = (
            sum(element_log_probs(self.predictions(stream, condition, start))).double().sum(1)
            for start in (
                StreamState(self.layout, condition.labels, fixed, ascending=True),
                KnownState(self.layout, condition.labels, state.known, fixed),
            )
        )
        return log_probs - proposed

    def pack(self, codes, grain_map, class_labels=None) -> DQStream:
        """Streams of codes and grain map; arguments and errors as in `forward`."""
        codes, grain_map = self.check_codes(codes, grain_map)
        condition = class_condition(class_labels, len(codes), self.config, codes.device)
        return self.layout.pack(codes, grain_map, condition.labels)

    def check_codes(self, codes, grain_map):
        """Both as long tensors on the model's device; errors as in `forward`."""
        device = self.input_device
        batch = len(codes) if isinstance(codes, torch.Tensor) else None
        codes = check_indices("codes", codes, ("B", *self.config.grid_sizes[-1]), self.config.codebook_size, device)
        if batch == 0:
            raise ValueError("codes must hold at least one image, got a batch of 0")
        grain_map = check_indices(
            "grain_map", grain_map, (batch, *self.config.grid_sizes[0]), len(self.config.grid_sizes), device
        )
        if not torch.compiler.is_compiling():
            check_cells(codes, grain_map, len(self.config.grid_sizes))
        return codes, grain_map

    def unpack(self, contents, positions, lengths):
        """Codes (B, H, W) and grain map (B, h, w) of streams (B, L), (B, L), (B,); the inverse of `pack`.

        Raises:
            TypeError, ValueError: tensors of another type, shape or range; streams that are not whole.
        """
        device = self.input_device
        shape = contents.shape if isinstance(contents, torch.Tensor) else ("B", "L")
        contents = check_indices("contents", contents, ("B", "L"), self.config.content_vocab_size, device)
        positions = check_indices("positions", positions, shape, self.config.position_vocab_sizes[-1], device)
        lengths = check_indices("lengths", lengths, shape[:1], contents.shape[1] + 1, device)
        return self.layout.unpack(contents, positions, lengths)

    def condition(
        self,
        class_labels=None,
        batch=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        negative_encoder_hidden_states=None,
        negative_encoder_attention_mask=None,
    ) -> Condition:
        """What images are generated for: class labels as in `class_condition`, and text.

        Args:
            encoder_hidden_states, encoder_attention_mask: as in `forward`, of one text or of one for each image.
            negative_encoder_hidden_states, negative_encoder_attention_mask: of the twin's text; None: no text.

        Raises:
            TypeError, ValueError: as in `class_condition`; text given to a model without it, or of another shape.
        """
        texts = [
            (encoder_hidden_states, encoder_attention_mask),
            (negative_encoder_hidden_states, negative_encoder_attention_mask),
        ]
        if self.text_prefix is None:
            if any(given is not None for text in texts for given in text):
                raise ValueError(
                    "this model was trained without text (text_length None): leave out encoder_hidden_states"
                )
            return class_condition(class_labels, batch, self.config, self.input_device)
        if any(states is None and mask is not None for states, mask in texts):
            raise ValueError(
                "encoder_attention_mask is of encoder_hidden_states: give both; likewise the negative ones"
            )
        prefixes = [
            self.text_prefix.empty()[None] if states is None else self.text_prefix(states, mask)
            for states, mask in texts
        ]
        num_texts = max(map(len, prefixes))
        if batch is None and (class_labels is None or num_texts > 1):
            batch = num_texts
        condition = class_condition(class_labels, batch, self.config, self.input_device)
        for name, prefix in zip(("encoder_hidden_states", "negative_encoder_hidden_states"), prefixes):
            if len(prefix) not in (1, len(condition)):
                raise ValueError(
                    f"{name} must be of one text or of one for each of {len(condition)} images, got {len(prefix)}"
                )
        prefix, null_prefix = (prefix.expand(len(condition), -1, -1) for prefix in prefixes)
        return replace(condition, prefix=prefix, null_prefix=null_prefix)

    def hide_at_random(self, condition):
        """The condition with some images' class and text hidden, for training; one draw an image decides on both."""
        config, has_text = self.config, condition.prefix is not None
        if config.class_dropout == 0 and not (has_text and config.text_dropout > 0):
            return condition
        draw = torch.rand(len(condition), 1, device=condition.labels.device)[:, 0]
        return condition.hide(
            draw < config.class_dropout if config.class_dropout > 0 else None,
            draw < config.text_dropout if has_text else None,
        )

    def embed(self, contents, positions, granularities, places=None, finest=False):
        """Input of the Position-Transformer, (B, L, width), for elements at `places` (L,) of the stream, else its first.

        `finest` says that all are of the finest granularity.
        """
        if places is None:
            places = torch.arange(contents.shape[1], device=contents.device)
        return self.dropout(
            self.content_embedding(contents)
            + self.embed_positions(positions, granularities, finest)
            + self.stream_embedding(places)
            + self.granularity_embedding(granularities)
        )

    def embed_positions(self, positions, granularities, finest=False):
        """Each element's position (B, L) from its own granularity's table, (B, L, width); `finest` as in `embed`."""
        embedded = self.position_embeddings[-1](positions)
        if finest:
            return embedded
        for granularity, table in enumerate(self.position_embeddings[:-1]):
            coarser = table(positions.clamp(max=table.num_embeddings - 1))
            embedded = torch.where((granularities == granularity)[..., None], coarser, embedded)
        return embedded


def element_log_probs(predictions):
    """Log-probabilities (B, L) of every position and of every content of streams, in nats, from `predictions`: two."""
    pairs = [[log_prob_of(*symbol) for symbol in element] for element in predictions]
    start = [torch.zeros_like(pairs[0][0])] * 2  # forced
    return [torch.stack(column, dim=1) for column in zip(start, *pairs)]


def log_prob_of(logits, allowed, chosen):
    """Log-probability (B,) of the chosen index (B,) by logits (B, V) of what is allowed (B, V)."""
    scores = logits.masked_fill(~allowed, -torch.inf).log_softmax(1, dtype=precise(logits.dtype))
    return scores.gather(1, chosen[:, None])[:, 0]


def masked_cross_entropy(logits, targets, mask):
    """Mean cross-entropy in nats over the targets (B, L) where the mask is true; 0 if it is nowhere."""
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    weights = mask.flatten().to(losses.dtype)
    return (losses * weights).sum() / weights.sum().clamp(min=1)
