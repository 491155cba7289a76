"""The one step loop: predict, choose, append, for one element of every image or for several of the fixed finest part.

Both stacks are causal, so that what is chosen depends on what stands before it and on nothing else. Where the finest
positions are fixed, a pass may therefore read guesses of the next few codes at once and keep those that its own choices
agree with: the codes are those that one element after the other gives.
"""

import torch

from .fused_dq import cached_stack
from .layers_dqtransformer import Window, make_cache

POSITION, CONTENT = 0, 1  # the two symbols of an element


class Reader:
    """The model's two stacks, each with a cache of what it has read: the condition's prefix, then the streams' elements.

    Under guidance every stream is read twice, with its condition and with the hidden twin: hidden states are (2B, L, width),
    the twins' behind, logits (B, L, V).

    Args:
        model, condition, guidance_scale: as in `generation_steps`.
        compileable: whether the caches can be compiled.
    """

    def __init__(self, model, condition, guidance_scale, compileable):
        self.model, self.guidance_scale = model, guidance_scale
        self.twin = condition.hidden() if guidance_scale != 1 else None
        self.prefix_length = condition.prefix_length
        room = self.prefix_length + model.config.longest_stream
        position_cache = make_cache(model.config.num_position_layers, room, compileable)
        content_cache = make_cache(model.config.num_content_layers, room, compileable)
        if condition.prefix is not None:
            prefix = condition.prefix if self.twin is None else torch.cat([condition.prefix, self.twin.prefix])
            model.content_transformer(model.position_transformer(prefix, position_cache), content_cache)
        self.position_stack = cached_stack(model.position_transformer, position_cache)
        self.content_stack = cached_stack(model.content_transformer, content_cache)

    def both(self, column):
        """A column (B, L) for the streams, and again for their twins if they have them."""
        return column if self.twin is None else torch.cat([column, column])

    def both_elements(self, contents, positions, granularities, any_start=True):
        """Elements (B, L) likewise. Twins differ in their start tokens; `any_start` False says that there are none."""
        columns = contents, positions, granularities
        if self.twin is None or not any_start:
            return [self.both(column) for column in columns]
        twins = (*self.model.layout.relabel(*columns, self.twin.labels), granularities)
        return [torch.cat(pair) for pair in zip(columns, twins)]

    def window(self, places):
        """Where elements at these places of the streams stand in the caches."""
        slots = self.prefix_length + places
        return Window(slots, int(slots.max()) + 1)

    def read(self, elements, places, window=None, finest=False):
        """What the Position-Transformer makes of elements, `both_elements`; the arguments are those of `embed`."""
        return self.position_stack(self.model.embed(*elements, places, finest), window=window)

    def position_logits(self, hidden_states):
        """Logits of the positions behind elements of which `read` gave these states."""
        return self._guide(self.model.position_head(hidden_states))

    def content_logits(self, hidden_states, positions, granularities, window=None, finest=False):
        """Logits of the contents at these positions, `both`, given the states of the elements before them."""
        hidden_states = hidden_states + self.model.embed_positions(positions, granularities, finest)
        return self._guide(self.model.content_head(self.content_stack(hidden_states, window=window)))

    def _guide(self, logits):
        """Classifier-free guidance (Ho & Salimans 2022)."""
        if self.twin is None:
            return logits
        conditional, unconditional = logits.float().chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)


def generation_steps(model, state, condition, source, guidance_scale=1.0, compile_config=None, lookahead=1):
    """Choose elements of every image until its stream ends; yields the `StreamState` after each pass.

    Args:
        model: `DQTransformerForImageGeneration`, in evaluation mode.
        state: `StreamState` of the condition's labels, at the beginning of its streams.
        condition: `Condition`.
        source: where the elements come from: `Draw`, `Greedy` or `Replay`, or the codec's `Decode`.
        guidance_scale: as in `SamplingOptions`.
        compile_config, lookahead: as in `generate_steps`.
    """
    compiled = compile_config is not None
    reader = Reader(model, condition, guidance_scale, compiled)
    first = state.allowed_positions().long().argmax(1)  # the start token, allowed alone
    state.append(first, state.allowed_contents(first).long().argmax(1))

    places = torch.arange(model.config.longest_stream, device=condition.labels.device)
    step = compiled_step = append_next
    if compiled:
        compiled_step = torch.compile(step, **compile_config.to_dict())
    for i in range(1, len(places)):
        if is_over(state.finished if compiled else state.positions_are_fixed(), state):
            break
        step(reader, state, places[i - 1 : i], source, source.inputs(i))
        step = compiled_step  # the first step is not compiled: it makes the caches' buffers
        yield state
    if not state.finished.all():
        yield from fixed_steps(reader, state, source, lookahead)


def is_over(done, state):
    """Whether all images are done, (B,) bool; waits for the device. ValueError at logits that were not finite."""
    done, finite = torch.stack([done.all(), state.finite.all()]).tolist()
    check_finite(finite)
    return done


def check_finite(finite):
    """Raise ValueError unless a model's logits were finite."""
    if not finite:
        raise ValueError(
            "the model's logits are not finite, so they say nothing of what comes: its weights are NaN, or too large for "
            "their dtype; load it with dtype=torch.bfloat16 or torch.float32"
        )


def append_next(reader, state, place, source, inputs):
    """Choose the element behind `state.last` and append it.

    Args:
        reader: `Reader`.
        state, source: as in `generation_steps`.
        place: (1,) long, of the last element in the streams.
        inputs: what the source chooses by, see `Greedy`.
    """
    last = [column[:, None] for column in state.last]
    hidden_states = reader.read(reader.both_elements(*last), place)
    logits = state.watch(reader.position_logits(hidden_states)[:, -1])
    positions = source.choose(POSITION, state.steer(logits), state.allowed_positions(), inputs)

    following = last[0], positions[:, None], state.granularity[:, None]  # contents are not read
    _, *following = reader.both_elements(*following)
    logits = state.watch(reader.content_logits(hidden_states, *following)[:, -1])
    state.append(positions, source.choose(CONTENT, logits, state.allowed_contents(positions), inputs))


def fixed_steps(reader, state, source, lookahead):
    """Choose what is left of the streams when all positions are known; yields the state after each pass.

    Args:
        reader: `Reader`.
        state, source, lookahead: as in `generation_steps`.
    """
    rest = FixedPart(state, lookahead)
    granularities = torch.full_like(rest.targets, state.layout.num_granularities - 1)
    inputs = rest.inputs(source)
    while not is_over(rest.has_all_codes, state):
        targets = rest.targets
        guesses, positions, next_positions = rest.elements(targets)
        places = reader.both(rest.first - 1 + targets)
        window = reader.window(places) if lookahead > 1 else None  # else all images that go on are at one place
        any_start = rest.num_passes == 0  # later passes have codes before their targets
        elements = reader.both_elements(guesses, positions, granularities, any_start)
        hidden_states = reader.read(elements, places, window, finest=True)
        following = reader.both(next_positions), elements[2]
        logits = state.watch(reader.content_logits(hidden_states, *following, window, finest=True)).flatten(0, 1)
        allowed = state.allowed_contents(next_positions).flatten(0, 1)
        chosen_by = None if inputs is None else inputs.gather(2, targets.expand(2, -1, -1)).flatten(1)
        rest.accept(targets, guesses, source.choose(CONTENT, logits, allowed, chosen_by).view_as(targets))
        yield state
    rest.write(rest.num_targets)  # the ends
    yield state


class FixedPart:
    """What is left of streams whose positions are all known: the finest codes in the training order, and the end.

    An element that is left is a target. A pass chooses several, given the element before each, which may be a guess:
    what the last pass chose for it. For the place after a wrong guess it is what an earlier pass chose there after the
    right element, if one did.

    Args:
        state: `StreamState`, into which everything is written that has come.
        window: targets of a pass.
    """

    def __init__(self, state, window):
        layout, free = state.layout, ~state.taken
        self.state, self.lengths, self.num_passes = state, state.lengths, 0
        self.first = int(state.lengths.max())  # place in the streams of the first target; of all images that go on
        self.num_codes = free.sum(1)
        self.num_targets = self.num_codes + ~state.finished
        self.length = int(self.num_targets.max())
        order = torch.where(free, state.tables.rank[-1], free.shape[1]).argsort(dim=1)  # what is free comes first
        self.target_of_cell = order.argsort(dim=1).clamp(max=self.length - 1)  # (B, F)
        self.done = torch.zeros_like(self.lengths)  # targets that have come
        ahead = torch.arange(self.length, device=free.device)
        self.ahead = ahead[:window]
        special = ahead - self.num_codes[:, None] + state.finished[:, None]  # 0: the end; above: padding
        positions = torch.where(special == 0, layout.num_cells[-1] + 1, layout.num_cells[-1])
        positions = torch.where(special < 0, torch.nn.functional.pad(order, (0, 1))[:, : self.length], positions)
        # Views of what the state holds, from the last element on: target i is in column i + 1, the one before it in i.
        self.contents, self.positions, _ = state.elements[:, :, self.first - 1 : self.first + self.length]
        self.positions[:, 1:] = positions
        for column, each in zip(self.contents[:, 1:].unbind(1), positions.unbind(1)):
            column.copy_(state.allowed_contents(each).byte().argmax(1))  # right where only one is allowed
        memory = self.contents.new_full((2, len(free), self.length, len(self.ahead)), -1)
        self.guessed, self.chosen = memory  # what a pass guessed before a target, and chose for it

    @property
    def targets(self):
        """Those of the next pass, (B, L) long; the last one fills up."""
        return (self.done[:, None] + self.ahead).clamp(max=self.length - 1)

    def elements(self, targets):
        """Contents, guesses among them, and positions of what is before targets (B, L), and the targets' positions."""
        before = [column.gather(1, targets) for column in (self.contents, self.positions)]
        return *before, self.positions.gather(1, targets + 1)

    def inputs(self, source):
        """What the source chooses all targets by, (2, B, targets), or None."""
        inputs = [source.inputs(self.first + target) for target in range(self.length)]
        return None if inputs[0] is None else torch.stack(inputs, dim=2)

    @property
    def has_all_codes(self):
        """Of which images all codes have come, (B,) bool."""
        return self.done >= self.num_codes

    def accept(self, targets, guesses, chosen):
        """Write what a pass has chosen for its targets (B, L) given guesses (B, L), as far as these were right."""
        self.contents.scatter_(1, targets + 1, chosen)
        if len(self.ahead) == 1:
            self.write(self.done + 1)
        else:
            self.write(self.done + 1 + (chosen[:, :-1] == guesses[:, 1:]).cumprod(1).sum(1))
            self._remember(targets, guesses, chosen)
        self.num_passes += 1

    def _remember(self, targets, guesses, chosen):
        """Guess the next target from what it would have been in earlier passes. A target is in so many passes at most."""
        for memory, values in ((self.guessed, guesses), (self.chosen, chosen)):
            memory[..., self.num_passes % len(self.ahead)].scatter_(1, targets, values)
        target = self.targets[:, :1]
        guessed, chosen = (memory[torch.arange(len(target)), target[:, 0]] for memory in (self.guessed, self.chosen))
        right = guessed == self.contents.gather(1, target)  # (B, L), of earlier passes
        remembered = chosen.gather(1, right.byte().argmax(1, keepdim=True))
        last = self.contents.gather(1, target + 1)
        self.contents.scatter_(1, target + 1, torch.where(right.any(1, keepdim=True), remembered, last))

    def write(self, done):
        """Put into the state that so many targets (B,) have come."""
        state, self.done = self.state, torch.minimum(done, self.num_targets)
        has_come = self.target_of_cell < torch.minimum(self.done, self.num_codes)[:, None]  # (B, F)
        codes = self.contents[:, 1:].gather(1, self.target_of_cell)
        state.codes = torch.where(has_come, codes, state.codes)
        state.fine_grain_map = state.fine_grain_map.masked_fill(has_come, state.layout.num_granularities - 1)
        state.taken = state.taken | has_come
        state.finished = self.done == self.num_targets
        state.lengths = self.lengths + self.done
