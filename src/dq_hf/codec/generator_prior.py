"""Codes and grain map by the probabilities that the generator gives them, element by element (arithmetic coding).

What is forced costs nothing: start tokens, ends that must come, the finest positions.

Writer and reader must come to the same tables, bit for bit. So all is calculated on the CPU, in float64, one image at a
time, with plain attention, and probabilities are rounded to 16 bits. Another processor or library rounds the last of 53
bits differently, which changes one of those tables in about one image of a million.
"""

import copy
import math

import torch

from ..modeling.constraints_dq import StreamState
from ..modeling.generation_dq import Replay, evaluation_mode
from .container import GENERATOR
from .entropy_coder import EntropyDecoder, EntropyEncoder

MOST_FREQUENT = 2**16 - 1  # what the largest probability becomes
# Of those; what is rounded to 0 gets a sixteenth of one, or rare codes of a large codebook would take too much from others.
UNIT = 16


class Encode(Replay):
    """Gives the elements of one stream that is there already, as `Replay`, and writes them to an `EntropyEncoder`."""

    def __init__(self, positions, contents, encoder):
        super().__init__(positions, contents)
        self.encoder = encoder

    def choose(self, symbol, logits, allowed, inputs):
        """As `Greedy.choose`, for one image."""
        chosen = super().choose(symbol, logits, allowed, inputs)
        self.encoder.encode(int(allowed[0, : int(chosen)].sum()), frequencies(logits[0, allowed[0]]))
        return chosen


class Decode:
    """Reads the elements of one stream from an `EntropyDecoder`."""

    def __init__(self, decoder):
        self.decoder = decoder

    def inputs(self, step):
        """What `choose` gets besides at a step: nothing."""

    def choose(self, symbol, logits, allowed, inputs):
        """As `Greedy.choose`, for one image."""
        (index,) = self.decoder.decode(frequencies(logits[0, allowed[0]]))
        return allowed[0].nonzero()[index]


def frequencies(logits):
    """Whole numbers from 1 to 2^20, (V,) numpy, of logits (V,) float64."""
    return torch.round((logits - logits.max()).exp() * MOST_FREQUENT).mul(UNIT).clamp(min=1).numpy()


class GeneratorPrior:
    """What the generator knows of images of a class or, where it was trained for it, of any.

    Args:
        model: `DQForImageGeneration` or `DQPipeline`.
        class_label: id of the class, or None.

    Raises:
        TypeError, ValueError: no class where the model needs one, or one that it does not have.
    """

    flag = GENERATOR

    def __init__(self, model, class_label=None):
        self.factor = model.vae.config.granularities[0]  # side of a region in pixels
        self.fast = model.transformer  # for estimates
        self.exact = copy.deepcopy(model.transformer).cpu().double().eval()
        self.exact.set_attn_implementation("eager")
        self.shape = tuple(self.exact.config.grid_sizes[0])
        self.class_label = class_label
        self.condition = self._condition(self.exact)

    def encode(self, codes, grain_map):
        """The payload of codes (H, W) and grain map (h, w), of the generator's grids."""
        stream = self.exact.layout.pack(codes[None].cpu(), grain_map[None].cpu(), self.condition.labels)
        encoder = EntropyEncoder()
        self._run(Encode(stream.positions, stream.contents, encoder))
        return encoder.to_bytes()

    def decode(self, payload, shape):
        """As `StaticPrior.decode`."""
        if shape != self.shape:
            raise ValueError(f"images must have {self.shape} regions, got {shape}")
        codes, grain_map = self._run(Decode(EntropyDecoder(payload))).grids()
        return codes[0], grain_map[0]

    @torch.no_grad()
    def least_bits(self, codes, grain_map):
        """About the bits of codes (H, W) and grain map (h, w), 1 % less for safety."""
        with evaluation_mode(self.fast):
            grids = (grid[None].to(self.fast.input_device) for grid in (codes, grain_map))
            output = self.fast.log_prob_under(self._condition(self.fast), *grids)
        return 0.99 * output.nats.item() / math.log(2)

    def _run(self, source):
        """The `StreamState` at the end of a stream."""
        state = StreamState(self.exact.layout, self.condition.labels, ascending=True)
        for _ in self.exact.run_steps(state, self.condition, source):
            pass
        return state

    @torch.no_grad()
    def _condition(self, transformer):
        """The `Condition` of one image."""
        config = transformer.config
        without_class = config.num_classes > 0 and self.class_label is None
        if without_class and config.class_dropout == 0:
            raise ValueError("this model was trained with a class for every image: give class_label")
        condition = transformer.condition(0 if without_class else self.class_label, 1)
        return condition.hide(labels=torch.ones_like(condition.labels) > 0) if without_class else condition
