"""The one step loop: predict, choose, append, for one element of every image or for several of the fixed finest part.

Both stacks are causal, so that what is chosen depends on what stands before it and on nothing else. Where the finest
positions are fixed, a pass may therefore read guesses of the next few codes at once and keep those that its own choices
agree with: the codes are those that one element after the other gives.
"""

import torch

from .layers_dqtransformer import Window, make_cache

POSITION, CONTENT = 0, 1  # the two symbols of an element


def generation_steps(model, state, condition, source, guidance_scale=1.0, compile_config=None, lookahead=1):
    """Choose elements of every image until its stream ends; yields the `StreamState` after each pass.

    Args:
        model: `DQTransformerForImageGeneration`, in evaluation mode.
        state: `StreamState` of the condition's labels, at the beginning of its streams.
        condition: `Condition`.
        source: where the elements come from: `Draw`, `Greedy` or `Replay`.
        guidance_scale: as in `SamplingOptions`.
        compile_config, lookahead: as in `generate_steps`.
    """
    hidden = condition.hidden() if guidance_scale != 1 else None
    most_elements = model.config.longest_stream
    places = torch.arange(most_elements, device=condition.labels.device)
    compiled = compile_config is not None
    caches = [
        make_cache(num_layers, condition.prefix_length + most_elements, compiled)
        for num_layers in (model.config.num_position_layers, model.config.num_content_layers)
    ]
    if condition.prefix is not None:
        prefix = condition.prefix if hidden is None else torch.cat([condition.prefix, hidden.prefix])
        model.content_transformer(model.position_transformer(prefix, caches[0]), caches[1])
    first = state.allowed_positions().long().argmax(1)  # the start token, allowed alone
    state.append(first, state.allowed_contents(first).long().argmax(1))

    step = compiled_step = append_next
    if compiled:
        compiled_step = torch.compile(step, **compile_config.to_dict())
    for i in range(1, most_elements):
        if (state.finished if compiled else state.positions_are_fixed()).all():  # waits for the device
            break
        step(model, state, places[i - 1 : i], source, source.inputs(i), caches, hidden, guidance_scale)
        step = compiled_step  # the first step is not compiled: it makes the caches' buffers
        yield state
    if not state.finished.all():
        yield from fixed_steps(
            model, state, source, caches, condition.prefix_length, hidden, guidance_scale, lookahead
        )


def append_next(model, state, place, source, inputs, caches, hidden, guidance_scale):
    """Choose the element behind `state.last`, whose place in the streams is `place` (1,) long, and append it."""
    last = [column[:, None] for column in state.last]
    state.append(*next_element(model, last, place, state, source, inputs, caches, hidden, guidance_scale))


def next_element(model, elements, places, state, source, inputs, caches=(None, None), hidden=None, guidance_scale=1.0):
    """Position and content (B,) of the element behind these.

    Args:
        elements: contents, positions and granularities, (B, L) each: those behind what the caches hold, or all.
        places: (L,) long, of these elements in the streams.
        state: `StreamState` that says what may come.
        source, inputs: choose from it, see `Greedy`.
        caches: of the Position- and the Content-Transformer.
        hidden: twin of the condition, for a guidance scale other than 1.
    """
    contents, positions, granularities = elements
    hidden_states = model.embed(*with_twin(model, hidden, *elements), places)
    hidden_states = model.position_transformer(hidden_states, caches[0])
    logits = guide(model.position_head(hidden_states[:, -1]), guidance_scale)
    next_positions = source.choose(POSITION, logits, state.allowed_positions(), inputs)

    contents = torch.cat([contents[:, 1:], torch.zeros_like(next_positions)[:, None]], 1)  # of the next one: not read
    positions = torch.cat([positions[:, 1:], next_positions[:, None]], 1)
    granularities = torch.cat([granularities[:, 1:], state.granularity[:, None]], 1)
    _, positions, granularities = with_twin(model, hidden, contents, positions, granularities)
    hidden_states = hidden_states + model.embed_positions(positions, granularities)
    logits = guide(model.content_head(model.content_transformer(hidden_states, caches[1])[:, -1]), guidance_scale)
    allowed = state.allowed_contents(next_positions)
    return next_positions, source.choose(CONTENT, logits, allowed, inputs)


def fixed_steps(model, state, source, caches, prefix_length, hidden=None, guidance_scale=1.0, lookahead=1):
    """Choose what is left of the streams when all positions are known; yields the state after each pass.

    Args:
        prefix_length: elements that the caches hold before the streams.
        model, state, source, caches, hidden, guidance_scale, lookahead: as in `generation_steps` and `next_element`.
    """
    rest = FixedPart(state)
    batch, num_left = rest.elements[0, :, 1:].shape
    contents, positions, granularities = (
        rest.elements
    )  # of target i in column i + 1: what it is predicted from is in i
    granularities = granularities[:, : min(lookahead, num_left)]
    ahead = torch.arange(granularities.shape[1], device=positions.device)
    done = torch.zeros_like(state.lengths)
    inputs = None
    if lookahead > 1:  # each image reads those of its own place
        inputs = [source.inputs(rest.first + target) for target in range(num_left)]
        inputs = None if inputs[0] is None else torch.stack(inputs, dim=2)  # (2, B, targets)
    for i in range(num_left):
        if (done >= rest.num_codes).all():  # only ends are left
            break
        targets = (done[:, None] + ahead).clamp(max=num_left - 1)  # (B, L)
        next_positions = positions.gather(1, targets + 1)
        guesses = contents.gather(1, targets)
        elements = with_twin(model, hidden, guesses, positions.gather(1, targets), granularities)
        following = with_twin(model, hidden, guesses, next_positions, granularities)
        if lookahead == 1:
            places, window, chosen_by = rest.first - 1 + targets[:1], None, source.inputs(rest.first + i)
        else:
            places = rest.first - 1 + (targets if hidden is None else torch.cat([targets, targets]))
            window = Window(prefix_length + places, prefix_length + rest.first + int(targets.max()))
            chosen_by = None if inputs is None else inputs.gather(2, targets.expand(2, -1, -1)).flatten(1)
        hidden_states = model.position_transformer(model.embed(*elements, places), caches[0], window)
        hidden_states = hidden_states + model.embed_positions(*following[1:])
        hidden_states = model.content_transformer(hidden_states, caches[1], window)
        logits = guide(model.content_head(hidden_states).flatten(0, 1), guidance_scale)
        allowed = state.allowed_contents(next_positions).flatten(0, 1)
        chosen = source.choose(CONTENT, logits, allowed, chosen_by).view(batch, -1)
        contents.scatter_(1, targets + 1, chosen)
        done = done + 1 + (chosen[:, :-1] == guesses[:, 1:]).cumprod(1).sum(1)
        rest.write(done)
        yield state
    rest.write(done + 1)
    yield state


def with_twin(model, hidden, contents, positions, granularities):
    """Elements (2B, L): the rows of the condition, and those of its hidden twin; without a twin the former, (B, L)."""
    if hidden is None:
        return contents, positions, granularities
    twin = model.layout.relabel(contents, positions, granularities, hidden.labels)
    return [torch.cat(pair) for pair in zip((contents, positions, granularities), (*twin, granularities))]


def guide(logits, scale):
    """Classifier-free guidance (Ho & Salimans 2022): logits (2B, V) of both conditions to (B, V). Scale 1: as they are."""
    if scale == 1:
        return logits
    conditional, unconditional = logits.float().chunk(2)
    return unconditional + scale * (conditional - unconditional)


class FixedPart:
    """What is left of streams whose positions are all known: the finest codes in the training order, and the end.

    Writes what has come into the `StreamState`.

    Attributes:
        first: place in the streams of what is left; that of all images, but of those that have ended.
        num_codes: (B,) long, codes that are left.
        elements: contents, positions and granularities (B, 1 + L), from the last element on; a view of the state's. The
            contents are guesses until they have come.
    """

    def __init__(self, state):
        layout, free = state.layout, ~state.taken
        self.state, self.lengths = state, state.lengths
        self.first = int(state.lengths.max())
        self.num_codes = free.sum(1)
        self.num_left = self.num_codes + ~state.finished
        most = int(self.num_left.max())
        self.elements = state.elements[:, :, self.first - 1 : self.first + most]
        contents, positions, _ = self.elements[:, :, 1:]
        order = torch.where(free, state.tables.rank[-1], free.shape[1]).argsort(dim=1)  # what is free comes first
        self.target = order.argsort(dim=1)  # of each cell, (B, F)
        special = (
            torch.arange(most, device=free.device) - self.num_codes[:, None]
        )  # 0: the end, where it is still to come
        special += state.finished[:, None]
        order = torch.nn.functional.pad(order, (0, 1))[:, :most]
        positions.copy_(torch.where(special < 0, order, layout.num_cells[-1] + (special == 0)))
        contents.copy_(torch.where(special < 0, 0, layout.content_pad + (special == 0)))

    def write(self, done):
        """So many elements (B,) have come."""
        state = self.state
        contents = self.elements[0, :, 1:]
        has_come = self.target < torch.minimum(done, self.num_codes)[:, None]  # (B, F)
        of_cell = contents.gather(1, self.target.clamp(max=contents.shape[1] - 1))
        state.codes = torch.where(has_come, of_cell, state.codes)
        state.fine_grain_map = state.fine_grain_map.masked_fill(has_come, state.layout.num_granularities - 1)
        state.taken = state.taken | has_come
        state.finished = done >= self.num_left
        state.lengths = self.lengths + torch.minimum(done, self.num_left)
