"""Configuration of DQ-Transformer, which generates variable-length codes from coarse to fine (stage 2)."""

import math
from typing import ClassVar

from .configuration_utils_dq import (
    MOST_COUNT,
    MOST_LAYERS,
    MOST_WIDTH,
    DQPreTrainedConfig,
    check_choice,
    require_at_most,
    require_finite,
    require_positive,
    require_probability,
)
from .sampling_options_dq import DEFAULT_NAMES, SamplingOptions


class DQTransformerConfig(DQPreTrainedConfig):
    """Sizes and choices of a `DQTransformerForImageGeneration` (arXiv 2305.11718, section 3.2).

    Args:
        grid_sizes: [rows, columns] of each granularity's grid, coarsest first, each twice the one before.
        codebook_size: number of codes N of the tokenizer.
        num_classes: classes of a class-conditional model; 0: unconditional. Their names are `id2label`.
        class_dropout: probability that training hides an image's class, for classifier-free guidance. Above 0 the
            vocabularies get one more start token, that of the hidden class.
        text_hidden_size: width of the states of the text encoder, for a model with text; None: without.
        text_length: slots for tokens that both stacks read before the stream; None: without text.
        text_dropout: probability that training hides an image's text, for classifier-free guidance.
        hidden_size: width of both stacks.
        num_attention_heads: heads of every layer.
        num_position_layers: layers of the Position-Transformer.
        num_content_layers: layers of the Content-Transformer.
        max_stream_length: rows of the table of absolute positions in the stream. Default: the longest stream, all
            regions finest.
        fine_order: order of the cells within a granularity: "row-first" (raster) or "region-first" (region by
            region, raster inside).
        embedding_dropout, residual_dropout, attention_dropout: probabilities.
        content_loss_weight, position_loss_weight: of the two terms of the training loss.
        sampling_defaults: what `generate` takes for options that are not given: any of `SamplingOptions` but
            fine_positions.
    """

    model_type = "dqtransformer"
    attribute_map: ClassVar = {"max_position_embeddings": "max_stream_length"}
    keys_to_ignore_at_inference: ClassVar = [
        "content_loss",
        "position_loss",
        "coarse_position_loss",
        "fine_position_loss",
        "position_losses",
        "stream",
    ]  # what `Trainer` does not gather

    grid_sizes: list[list[int]] = ((16, 16), (32, 32))
    codebook_size: int = 1024
    num_classes: int = 0
    class_dropout: int | float = 0.0
    text_hidden_size: int | None = None
    text_length: int | None = None
    text_dropout: int | float = 0.1
    hidden_size: int = 1024
    num_attention_heads: int = 8
    num_position_layers: int = 6
    num_content_layers: int = 18
    max_stream_length: int | None = None
    fine_order: str = "row-first"
    embedding_dropout: int | float = 0.1
    residual_dropout: int | float = 0.1
    attention_dropout: int | float = 0.1
    content_loss_weight: int | float = 1.0
    position_loss_weight: int | float = 1.0
    sampling_defaults: dict[str, int | float] | None = None

    def __post_init__(self, num_labels=None, **kwargs):
        if num_labels is not None:
            if self.num_classes not in (0, num_labels):
                raise ValueError(f"num_labels is num_classes, {self.num_classes}; got {num_labels}")
            self.num_classes = num_labels
        if self.id2label is None and isinstance(self.label2id, dict):
            self.id2label = {i: name for name, i in self.label2id.items()}
        elif self.id2label is None:  # else transformers names two classes
            self.validate_types()
            require_at_most(self, MOST_WIDTH, "num_classes")
            self.id2label = {i: f"LABEL_{i}" for i in range(self.num_classes)}
        super().__post_init__(**kwargs)

    def validate_types(self):
        if isinstance(self.grid_sizes, (list, tuple)):
            self.grid_sizes = [list(grid) if isinstance(grid, tuple) else grid for grid in self.grid_sizes]
        super().validate_types()

    def fill_defaults(self):
        if self.max_stream_length is None and self.grid_sizes:
            self.max_stream_length = self.longest_stream
        if self.sampling_defaults is None:
            self.sampling_defaults = {}
        if self.label2id is None:
            self.label2id = {name: i for i, name in self.id2label.items()}

    @property
    def num_labels(self):
        """`num_classes`. Another number gives the classes new names."""
        return self.num_classes

    @num_labels.setter
    def num_labels(self, num_labels):
        if num_labels != self.num_classes:
            self.num_classes = num_labels
            self.id2label = {i: f"LABEL_{i}" for i in range(num_labels)}
            self.label2id = {name: i for i, name in self.id2label.items()}

    @property
    def num_hidden_layers(self):
        """Layers of both stacks."""
        return self.num_position_layers + self.num_content_layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, value):
        raise NotImplementedError("set num_position_layers and num_content_layers, whose sum num_hidden_layers is")

    @property
    def vocab_size(self):
        """`content_vocab_size`."""
        return self.content_vocab_size

    @vocab_size.setter
    def vocab_size(self, value):
        raise NotImplementedError("set codebook_size and num_classes, which vocab_size follows from")

    @property
    def num_cells(self):
        """Cells of each granularity's grid, coarsest first."""
        return [math.prod(grid) for grid in self.grid_sizes]

    @property
    def longest_stream(self):
        """Elements of the longest stream: every cell of the finest grid, and start and end of each granularity."""
        return self.num_cells[-1] + 2 * len(self.grid_sizes)

    @property
    def num_start_tokens(self):
        """Start tokens of a vocabulary: one, or one a class, and one for the hidden class."""
        return max(self.num_classes, 1) + (self.class_dropout > 0)

    @property
    def content_vocab_size(self):
        """Codes, pad, end and start tokens."""
        return self.codebook_size + 2 + self.num_start_tokens

    @property
    def position_vocab_sizes(self):
        """Cells, pad, end and start tokens of each granularity, coarsest first."""
        return [cells + 2 + self.num_start_tokens for cells in self.num_cells]

    def validate_fields(self):
        require_positive(self, "codebook_size", "hidden_size", "num_attention_heads")
        require_positive(self, "num_position_layers", "num_content_layers")
        require_at_most(self, MOST_LAYERS, "num_position_layers", "num_content_layers")
        require_at_most(self, MOST_WIDTH, "hidden_size", "num_classes")
        require_at_most(self, MOST_COUNT, "codebook_size")
        require_probability(
            self, "class_dropout", "text_dropout", "embedding_dropout", "residual_dropout", "attention_dropout"
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        grids = self.grid_sizes
        doubled = all(fine == [2 * side for side in coarse] for coarse, fine in zip(grids, grids[1:]))
        if not grids or any(len(grid) != 2 or min(grid) < 1 for grid in grids) or not doubled:
            raise ValueError(
                "grid_sizes must be [rows, columns] pairs, coarsest first, each twice the one before, "
                f"like [[16, 16], [32, 32]]; got {grids}"
            )
        require_at_most(self, MOST_COUNT, "max_stream_length")
        if self.max_stream_length < self.longest_stream:
            raise ValueError(
                f"max_stream_length must be at least {self.longest_stream}, the longest stream of grid_sizes {grids}; "
                f"got {self.max_stream_length}"
            )
        check_choice("fine_order", self.fine_order, ("row-first", "region-first"))
        if self.num_classes < 0 or (self.class_dropout > 0 and self.num_classes == 0):
            raise ValueError(
                "num_classes must be 0 (unconditional) or positive, and positive where class_dropout is; "
                f"got num_classes {self.num_classes}, class_dropout {self.class_dropout}"
            )
        if (self.text_hidden_size is None) != (self.text_length is None):
            raise ValueError(
                "text_hidden_size and text_length must be given together, or neither; "
                f"got {self.text_hidden_size} and {self.text_length}"
            )
        if self.text_length is not None:
            require_positive(self, "text_hidden_size", "text_length")
            require_at_most(self, MOST_WIDTH, "text_hidden_size", "text_length")
        names = {name: i for i, name in self.id2label.items()}
        if set(self.id2label) != set(range(self.num_classes)) or len(names) != self.num_classes:
            raise ValueError(
                f"id2label must name the classes 0 ... {self.num_classes - 1}, each differently; got {self.id2label}"
                if self.num_classes
                else f"id2label must be empty for an unconditional model, got {self.id2label}"
            )
        if names != self.label2id:
            raise ValueError(f"label2id must be the inverse of id2label {self.id2label}, got {self.label2id}")
        unknown = set(self.sampling_defaults) - set(DEFAULT_NAMES)
        if unknown:
            raise ValueError(
                f"sampling_defaults may hold {', '.join(DEFAULT_NAMES)}; got {', '.join(sorted(unknown))}"
            )
        SamplingOptions(**self.sampling_defaults)  # or an error
        require_finite(self, "content_loss_weight", "position_loss_weight")
