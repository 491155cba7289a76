"""Codes and grain map by the probabilities that the generator gives them, element by element (arithmetic coding).

What is forced costs nothing: start tokens, ends that must come, the finest positions.

Writer and reader must come to the same tables, bit for bit. So all is calculated on the CPU, in float64, one image at a
time, with plain attention, and probabilities are rounded to 16 bits. Another processor or library rounds the last of 53
bits differently, which changes one of those tables in about one image of a million.
"""

import copy

import torch

from ..data.fingerprint import is_quantized
from ..modeling.constraints_dq import StreamState
from ..modeling.step_loop_dq import check_finite
from ..modeling.text_dq import encode_prompts
from .container import GENERATOR
from .entropy_coder import EntropyDecoder, EntropyEncoder

MOST_FREQUENT = 2**16 - 1  # what the largest probability becomes
# Of those; what is rounded to 0 gets a sixteenth of one, or rare codes of a large codebook would take too much from others.
UNIT = 16


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
    check_finite(logits.isfinite().all())
    return torch.round((logits - logits.max()).exp() * MOST_FREQUENT).mul(UNIT).clamp(min=1).numpy()


class GeneratorPrior:
    """What the generator knows of images of a class, of a prompt or, where it was trained for it, of any.

    Args:
        model: `DQForImageGeneration` or `DQPipeline`.
        class_label: id of the class, or None.
        prompt: a text, or None.

    Raises:
        TypeError, ValueError: a condition that the model does not take, or none where it needs one.
    """

    flag = GENERATOR

    def __init__(self, model, class_label=None, prompt=None):
        self.factor = model.vae.config.granularities[0]  # side of a region in pixels
        self.transformer = exact_copy(model.transformer)
        self.shape = tuple(self.transformer.config.grid_sizes[0])
        self.class_label, self.prompt = class_label, prompt
        self.condition = self._condition(model)

    @torch.no_grad()
    def encode(self, codes, grain_map):
        """The payload of codes (H, W) and grain map (h, w), of the generator's grids: all elements in one pass."""
        stream = self.transformer.layout.pack(codes[None].cpu(), grain_map[None].cpu(), self.condition.labels)
        encoder = EntropyEncoder()
        for element in self.transformer.predictions(stream, self.condition):
            for logits, allowed, chosen in element:
                index = int(allowed[0, : int(chosen)].sum())
                encoder.encode(index, frequencies(logits[0, allowed[0]]))
        return encoder.to_bytes()

    def decode(self, payload, shape):
        """As `StaticPrior.decode`, one element after the other."""
        if shape != self.shape:
            raise ValueError(f"images must have {self.shape} regions, got {shape}")
        state = StreamState(self.transformer.layout, self.condition.labels, ascending=True)
        for _ in self.transformer.run_steps(state, self.condition, Decode(EntropyDecoder(payload))):
            pass
        codes, grain_map = state.grids()
        return codes[0], grain_map[0]

    def least_bits(self, codes, grain_map):
        """As of `StaticPrior`: here 0, because `encode` is the way to know more."""
        return 0

    @torch.no_grad()
    def _condition(self, model):
        """The `Condition` of one image."""
        config = self.transformer.config
        states = ()
        if self.prompt is not None:
            if getattr(model, "text_encoder", None) is None or getattr(model, "tokenizer", None) is None:
                raise ValueError("prompt needs a model with text, with its text_encoder and tokenizer; leave it out")
            encoder = exact_copy(model.text_encoder)
            states = encode_prompts(model.tokenizer, encoder, self.prompt, config.text_length)
        without_class = config.num_classes > 0 and self.class_label is None
        if without_class and config.class_dropout == 0:
            raise ValueError("this model was trained with a class for every image: give class_label")
        condition = self.transformer.condition(0 if without_class else self.class_label, 1, *states)
        return condition.hide(labels=torch.ones_like(condition.labels) > 0) if without_class else condition


def exact_copy(module):
    """A model on the CPU, in float64, with plain attention."""
    module = copy.deepcopy(module).cpu()
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            if is_quantized(weight):
                setattr(part, name, torch.nn.Parameter(weight.dequantize()))
    module = module.double().eval()
    module.set_attn_implementation("eager")
    return module
