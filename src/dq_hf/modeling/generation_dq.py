"""Sampling as users call it: where the next code goes and which it is, whatever the source of the answers (paper section 3.2).

`generate_steps` is a Python generator that yields after every element. Where its symbols come from is a choice: `Draw`,
`Greedy` or `Replay`, or the codec's `Decode`. All else that samples or watches sampling is a caller of it.
"""

import warnings
from dataclasses import dataclass

import torch
from transformers import CompileConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import ModelOutput

from .constraints_dq import StreamState
from .known_dq import KnownState, known_elements
from .modeling_utils_dq import evaluation_mode
from .sampling_options_dq import OPTION_NAMES, SamplingOptions, argument_names, check_count
from .step_loop_dq import generation_steps


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


class Greedy:
    """Takes the largest logit of what is allowed."""

    def inputs(self, step):
        """What `choose` gets besides at a step: nothing."""

    def choose(self, symbol, logits, allowed, inputs):
        """One index of each row, (B,) long; logits (B, V), allowed (B, V) bool with at least one true in each row."""
        return logits.float().masked_fill(~allowed, -torch.inf).argmax(1)


class Draw:
    """Draws by inverse distribution function from uniform numbers fixed in advance: a seed is an image.

    Args:
        uniforms: (steps, 2, B) float64 in [0, 1), of each element's position and content.
        options: `SamplingOptions`.
    """

    def __init__(self, uniforms, options):
        self.uniforms = uniforms
        self.warpers = [
            make_warpers(options.position_temperature, options.position_top_k, options.position_top_p),
            make_warpers(options.temperature, options.top_k, options.top_p),
        ]

    def inputs(self, step):
        """The step's uniform numbers, (2, B)."""
        return self.uniforms[step]

    def choose(self, symbol, logits, allowed, inputs):
        """As `Greedy.choose`; the warpers are applied to what is allowed."""
        scores = logits.float().masked_fill(~allowed, -torch.inf)
        for warper in self.warpers[symbol]:
            scores = warper(None, scores)
        return draw_index(scores, inputs[symbol])


class Replay:
    """Gives the elements of streams that are there already, whatever the logits say.

    Args:
        positions, contents: (B, L) long, whole streams.
    """

    def __init__(self, positions, contents):
        self.elements = torch.stack([positions, contents])  # in the order of POSITION and CONTENT

    def inputs(self, step):
        """The step's position and content, (2, B)."""
        return self.elements[:, :, step]

    def choose(self, symbol, logits, allowed, inputs):
        """As `Greedy.choose`."""
        return inputs[symbol]


class DQSamplingMixin:
    """Gives `generate` and `generate_steps` to the generator. (Not named GenerationMixin, which transformers looks for.)"""

    def generate(self, class_labels=None, num_images=None, **options) -> DQGenerationOutput:
        """Sample codes from coarse to fine; arguments and errors as in `generate_steps`."""
        *_, state = self.generate_steps(class_labels, num_images, **options)  # one object, as far as it has come
        return self.generation_output(state)

    def generate_steps(
        self,
        class_labels=None,
        num_images=None,
        do_sample=True,
        generator=None,
        compile_config=None,
        lookahead=1,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        negative_encoder_hidden_states=None,
        negative_encoder_attention_mask=None,
        codes=None,
        grain_map=None,
        fine_ratio=None,
        num_candidates=1,
        **options,
    ):
        """Sample codes from coarse to fine, one element of every image a pass; without dropout in any mode.

        A Python generator: it yields the `StreamState` after every pass, and whoever watches may stop.

        Args:
            class_labels: one integer, or one for each image; None for an unconditional model.
            num_images: images in all. Default: as many as class_labels or texts, or 1.
            do_sample: False takes the largest logit at every step (greedy); temperatures, top-k and top-p then
                would change nothing and are refused.
            generator: one `torch.Generator`, from which image i takes the i-th draw, or a list of one for each image.
                The draw seeds the image's own random stream, so that its result depends on nothing else. Default:
                torch's global generator.
            compile_config: a `transformers.CompileConfig` compiles the step, once for each batch size and setting; the
                caches are then read as a whole. None: nothing is compiled.
            lookahead: elements that a pass reads where the finest positions are fixed: the last one and guesses of those
                behind it, of which it keeps as many as come out as guessed. More than 1 changes the number of passes and
                what one costs, but neither the images (to the rounding of the logits, as between batch sizes) nor free
                positions.
            encoder_hidden_states, encoder_attention_mask, negative_encoder_hidden_states,
                negative_encoder_attention_mask: for a model with text, as in `condition`.
            grain_map: (h, w) or (B, h, w) integers, the granularity of each region; -1 where the model decides. An
                image with anything known is drawn in the training order.
            codes: (H, W) or (B, H, W) integers on the finest grid, as `encode` gives them, where the grain map is known;
                -1 where the model decides.
            fine_ratio: share of each image's regions, in [0, 1], that become fine (the nearest whole number); the model
                decides which. With more than two granularities a list of shares, one for each granularity but the coarsest.
            num_candidates: streams that are drawn of each image. One of them is kept, drawn by how well it
                explains what is known (`log_weights`); the first, where nothing is. States on the way
                show the first, the last one shows those that are kept.
            options: those of `SamplingOptions`: temperature, top_k, top_p, position_temperature, position_top_k,
                position_top_p, guidance_scale, fine_positions.

        Raises:
            TypeError, ValueError: arguments of another type or range, or weights whose logits are not finite.
        """
        check_count("num_images", num_images)
        check_count("num_candidates", num_candidates)
        self.check_passes(compile_config, lookahead)
        known = known_elements(self.config, self.input_device, codes, grain_map, fine_ratio)
        if num_candidates != 1 and (known is None or not do_sample):
            raise ValueError(
                "num_candidates above 1 needs do_sample, and something that is known: grain_map, codes or fine_ratio"
            )
        if known is not None and num_images is None and len(known) > 1:
            num_images = len(known)
        texts = encoder_hidden_states, encoder_attention_mask
        texts += negative_encoder_hidden_states, negative_encoder_attention_mask
        with torch.no_grad():
            condition = self.condition(class_labels, num_images, *texts)
        if not condition.is_finite():
            raise ValueError("encoder_hidden_states must be finite, negative ones too; got NaN or infinite values")
        batch, device = len(condition), condition.labels.device
        if known is not None and len(known) not in (1, batch):
            raise ValueError(
                f"grain_map, or the images to edit, must be one or one for each of {batch} images, got {len(known)}"
            )
        options = self.sampling_options(options, do_sample)
        if options.guidance_scale != 1:
            condition.hidden()  # or an error, before the work

        condition = condition.repeat(num_candidates)
        source = Greedy()
        if do_sample:
            generators = own_generators(generator, batch)
            source = Draw(uniform_numbers(generators, self.config.longest_stream, num_candidates).to(device), options)
        is_fixed = options.fine_positions == "fixed"
        if known is None:
            state = StreamState(self.layout, condition.labels, is_fixed)
        else:
            state = KnownState(self.layout, condition.labels, known.rows(batch, num_candidates), is_fixed)
        steps = self.run_steps(state, condition, source, options.guidance_scale, compile_config, lookahead)
        if num_candidates == 1:
            return steps
        return self.keep_candidates(steps, condition, uniform_numbers(generators, 1)[0, 0].to(device))

    def sampling_options(self, given, do_sample) -> SamplingOptions:
        """Options of `generate_steps`, and the configuration's where none are given; a warning at weak guidance."""
        options = SamplingOptions.of(given, others=argument_names(self.generate_steps))
        defaults = {"guidance_scale": 1.0} | self.config.sampling_defaults
        if not do_sample:
            options, defaults = options.greedy(), {"guidance_scale": defaults["guidance_scale"]}
        options = options.over(defaults)
        if options.guidance_scale < 1:
            warnings.warn(
                f"guidance_scale {options.guidance_scale} weakens class and text, and 0 ignores them; 1 means no guidance",
                stacklevel=3,
            )
        return options

    @torch.no_grad()
    def run_steps(self, *arguments):
        """`generation_steps`, in evaluation mode and without gradients, neither of which reaches the caller."""
        steps = generation_steps(self, *arguments)
        while True:
            with evaluation_mode(self):  # not while the caller has the state, who may never ask for the next
                state = next(steps, None)
            if state is None:
                return
            yield state

    @torch.no_grad()
    def keep_candidates(self, steps, condition, uniforms):
        """The steps, and a last state with one candidate of each image: drawn by how well it explains what is known."""
        num_candidates = len(condition) // len(uniforms)
        for state in steps:
            yield state.select(slice(None, None, num_candidates))
        with evaluation_mode(self):
            log_weights = self.log_weights(state, condition).view(-1, num_candidates)
        kept = draw_index(log_weights, uniforms)
        kept = kept.where(state.known.anything.view(-1, num_candidates)[:, 0], 0)
        yield state.select(torch.arange(len(uniforms), device=kept.device) * num_candidates + kept)

    def generation_output(self, state) -> DQGenerationOutput:
        """What the streams of a `StreamState` say, as far as they go."""
        codes, grain_map = state.grids()
        stream = state.stream()
        return DQGenerationOutput(
            codes=codes,
            grain_map=grain_map,
            positions=stream.positions,
            contents=stream.contents,
            lengths=stream.lengths,
        )

    def check_passes(self, compile_config, lookahead):
        """Refuse values of another type or range, and attention that takes no mask for what they need."""
        attention = self.config._attn_implementation
        if compile_config is not None and not isinstance(compile_config, CompileConfig):
            raise TypeError(f"compile_config must be a transformers.CompileConfig, got {compile_config!r}")
        check_count("lookahead", lookahead)
        if compile_config is not None and lookahead > 1:
            raise ValueError("lookahead above 1 does not work with compile_config; give one of the two")
        if compile_config is not None and "flash" in attention:  # has no mask for room behind the last element
            raise ValueError(
                f'compile_config does not work with attn_implementation {attention!r}; load the model with "sdpa"'
            )
        if lookahead > 1 and attention not in ("sdpa", "eager"):  # others have no mask for images at different places
            raise ValueError(
                f'lookahead above 1 does not work with attn_implementation {attention!r}; load the model with "sdpa"'
            )


def steps_arguments(transformer):
    """Names of all that a generator's `generate_steps` takes, those of a subclass of one's own too."""
    steps = DQSamplingMixin.generate_steps, transformer.generate_steps
    return (*OPTION_NAMES, *(name for each in steps for name in argument_names(each)))


def make_warpers(temperature, top_k, top_p):
    """transformers' warpers for one kind of logits; what is None changes nothing."""
    warpers = []
    if temperature not in (None, 1):
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(int(top_k)))
    if top_p not in (None, 1):
        warpers.append(TopPLogitsWarper(float(top_p)))
    return warpers


def draw_index(scores, uniforms):
    """One index (B,) of each row, drawn with the softmax of scores (B, V) by numbers (B,) in [0, 1)."""
    cumulative = scores.double().softmax(1).cumsum(1)
    threshold = (uniforms * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=scores.shape[1] - 1)


def own_generators(generator, num_images):
    """A generator for each image, seeded by the i-th draw from `generator`, or the first one from `generator[i]`."""
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * num_images
    if len(generators) != num_images:
        raise ValueError(f"generator must be one or a list of {num_images}, one for each image; got {len(generators)}")
    if any(source is not None and not isinstance(source, torch.Generator) for source in generators):
        raise TypeError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
    own = []
    for source in generators:
        device = "cpu" if source is None else source.device
        seed = torch.randint(2**63 - 1, (), generator=source, device=device).item()
        own.append(torch.Generator().manual_seed(seed))
    return own


def uniform_numbers(generators, num_steps, num_candidates=1):
    """Uniform numbers in [0, 1), (steps, 2, B) float64: each image's from its generator, one candidate after the other."""
    columns = [
        torch.rand(num_steps, 2, dtype=torch.float64, generator=own)
        for own in generators
        for _ in range(num_candidates)
    ]
    return torch.stack(columns, dim=2)
