"""DQ-Transformer once more, slowly: one image at a time, no cache, no masks, plain loops (method.md, section 7).

It shares nothing with the package but the names of the weights.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass
class SlowSample:
    contents: list
    positions: list
    codes: list  # rows of the finest grid
    grain_map: list


class SlowTransformer:
    """Reads weights and sizes of a `DQTransformerForImageGeneration`."""

    def __init__(self, model):
        self.weights = {name: value.detach() for name, value in model.state_dict().items()}
        config = model.config
        self.grids, self.num_codes, self.order = config.grid_sizes, config.codebook_size, config.fine_order
        self.heads, self.hidden_class = config.num_attention_heads, config.num_classes
        self.num_layers = {"position": config.num_position_layers, "content": config.num_content_layers}

    def logits(self, elements, prefix=None):
        """Position and content logits of every element but the last; `elements`: (content, position, granularity).

        `prefix` (T, width) is read before the elements.
        """
        weights = self.weights
        contents = torch.tensor([content for content, _, _ in elements])
        segments = torch.tensor([granularity for _, _, granularity in elements])
        places = torch.stack(
            [weights[f"position_embeddings.{granularity}.weight"][position] for _, position, granularity in elements]
        )
        hidden = weights["content_embedding.weight"][contents[:-1]] + places[:-1]
        hidden = hidden + weights["stream_embedding.weight"][: len(elements) - 1]
        hidden = hidden + weights["granularity_embedding.weight"][segments[:-1]]
        first = 0 if prefix is None else len(prefix)
        hidden = self.stack("position", hidden if prefix is None else torch.cat([prefix, hidden]))
        position_logits = self.head("position", hidden[first:])
        hidden = torch.cat([hidden[:first], hidden[first:] + places[1:]])
        return position_logits, self.head("content", self.stack("content", hidden)[first:])

    def log_probs(self, elements):
        """Of every position and of every content of a whole stream, two lists; what is forced has 0.

        Which positions may come is read off the streams of all grain maps that there are.
        """
        streams = all_training_positions(self.grids, self.order)
        codes = [(position, granularity) for content, position, granularity in elements if content < self.num_codes]
        every = [[], []]
        seen = 0  # codes so far
        for i, (content, position, granularity) in enumerate(elements):
            num_cells = self.grids[granularity][0] * self.grids[granularity][1]
            allowed, contents = {position}, {content}  # start, or the end that must come
            if content < self.num_codes + 2 and granularity < len(self.grids) - 1:
                same_so_far = [stream for stream in streams if stream[:seen] == codes[:seen]]
                here = {stream[seen] for stream in same_so_far if len(stream) > seen}
                allowed = {cell for cell, grain in here if grain == granularity}
                if any(grain > granularity for _, grain in here) or any(len(stream) == seen for stream in same_so_far):
                    allowed.add(num_cells + 1)
            if content < self.num_codes:
                contents, seen = range(self.num_codes), seen + 1
            for column, choices, chosen, logits in zip(
                every, (allowed, contents), (position, content), self.logits(elements[: i + 1]) if i else (None, None)
            ):
                forced = logits is None or len(choices) == 1
                scores = {} if forced else softmax({index: float(logits[-1][index]) for index in choices})
                column.append(0.0 if forced else math.log(scores[chosen]))
        return every

    def stack(self, name, hidden):
        for layer in range(self.num_layers[name]):
            prefix = f"{name}_transformer.layers.{layer}."
            normed = self.norm(prefix + "input_layernorm", hidden)
            hidden = hidden + self.linear(prefix + "attention.o_proj", self.attend(prefix + "attention.", normed))
            normed = self.norm(prefix + "post_attention_layernorm", hidden)
            inner = self.linear(prefix + "mlp.fc1", normed)
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            hidden = hidden + self.linear(prefix + "mlp.fc2", inner)
        return hidden

    def attend(self, prefix, hidden):
        query, key, value = (self.linear(f"{prefix}{name}_proj", hidden) for name in "qkv")
        width = hidden.shape[1] // self.heads
        columns = []
        for head in range(self.heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[:, part] @ key[:, part].T / math.sqrt(width)
            later = torch.ones_like(scores).triu(1).bool()
            columns.append(scores.masked_fill(later, -math.inf).softmax(1) @ value[:, part])
        return torch.cat(columns, 1)

    def linear(self, name, hidden):
        return hidden @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, hidden):
        return functional.layer_norm(
            hidden, hidden.shape[1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-5
        )

    def head(self, name, hidden):
        return self.norm(f"{name}_head.norm", hidden) @ self.weights[f"{name}_head.projection.weight"].T

    def sample(self, label=0, seed=None, fixed=True, guidance_scale=1.0, content_options=(), position_options=()):
        """One image. `seed`: of its own random stream, two numbers an element; None: greedy.

        Options are (temperature, top_k, top_p).
        """
        uniforms = None
        if seed is not None:
            longest = self.grids[-1][0] * self.grids[-1][1] + 2 * len(self.grids)
            uniforms = torch.rand(longest, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        image = SlowImage(self.grids, self.order, fixed)
        elements = []
        for granularity in range(len(self.grids)):
            num_cells = self.grids[granularity][0] * self.grids[granularity][1]
            elements.append((self.num_codes + 2 + label, num_cells + 2 + label, granularity))
            position = None
            while position != num_cells + 1:
                uniform = (None, None) if uniforms is None else uniforms[len(elements)].tolist()
                # The last element is the one to be drawn. Its content is not read; its position is, by the content
                # logits alone.
                logits = self.guided_logits(elements + [(0, 0, granularity)], guidance_scale)[0]
                position = choose(logits, image.allowed(granularity), position_options, uniform[0])
                logits = self.guided_logits(elements + [(0, position, granularity)], guidance_scale)[1]
                content = self.num_codes + 1
                if position < num_cells:
                    content = choose(logits, range(self.num_codes), content_options, uniform[1])
                    image.write(granularity, position, content)
                elements.append((content, position, granularity))
        contents, positions, _ = map(list, zip(*elements))
        return SlowSample(contents, positions, *image.grids_written())

    def guided_logits(self, elements, scale):
        """Position logits and content logits that predict the last element."""
        logits = [every[-1] for every in self.logits(elements)]
        if scale == 1:
            return logits
        hidden = []
        for content, position, granularity in elements:
            num_cells = self.grids[granularity][0] * self.grids[granularity][1]
            is_start = position >= num_cells + 2
            hidden.append(
                (self.num_codes + 2 + self.hidden_class, num_cells + 2 + self.hidden_class, granularity)
                if is_start
                else (content, position, granularity)
            )
        without = [every[-1] for every in self.logits(hidden)]
        return [bare + scale * (given - bare) for given, bare in zip(logits, without)]


def all_training_positions(grids, order):
    """For every grain map the (position, granularity) of all its codes, in the order of training streams."""
    rows, columns = grids[0]
    streams = []
    for grains in itertools.product(range(len(grids)), repeat=rows * columns):
        stream = []
        for granularity, (height, width) in enumerate(grids):
            side = height // rows
            image = SlowImage(grids, order, True)
            for cell in sorted(range(height * width), key=lambda cell: image.place(granularity, cell)):
                if grains[cell // width // side * columns + cell % width // side] == granularity:
                    stream.append((cell, granularity))
        streams.append(stream)
    return streams


class SlowImage:
    """Which cells of one image are taken, and by what."""

    def __init__(self, grids, order, fixed):
        self.grids, self.order, self.fixed = grids, order, fixed
        self.codes = [[None] * grids[-1][1] for _ in range(grids[-1][0])]
        self.grains = [[None] * grids[-1][1] for _ in range(grids[-1][0])]

    def fine_cells(self, granularity, position):
        rows, columns = self.grids[granularity]
        side = self.grids[-1][0] // rows
        top, left = position // columns * side, position % columns * side
        return [(row, column) for row in range(top, top + side) for column in range(left, left + side)]

    def allowed(self, granularity):
        """Positions that may be drawn in this granularity: free cells, and the end token."""
        rows, columns = self.grids[granularity]
        finest = granularity == len(self.grids) - 1
        free = []
        for position in range(rows * columns):
            if all(self.codes[row][column] is None for row, column in self.fine_cells(granularity, position)):
                free.append(position)
        end = rows * columns + 1
        if finest:
            if not free:
                return [end]
            if self.fixed:
                return [min(free, key=lambda position: self.place(granularity, position))]
            return free
        return free if self.any_region_half_covered() else free + [end]

    def place(self, granularity, position):
        """Sort key of a cell in training order."""
        columns = self.grids[granularity][1]
        row, column = position // columns, position % columns
        if self.order == "row-first":
            return row, column
        side = self.grids[granularity][0] // self.grids[0][0]
        return row // side, column // side, row, column

    def any_region_half_covered(self):
        for region in range(self.grids[0][0] * self.grids[0][1]):
            covered = [self.codes[row][column] is not None for row, column in self.fine_cells(0, region)]
            if any(covered) and not all(covered):
                return True
        return False

    def write(self, granularity, position, code):
        for row, column in self.fine_cells(granularity, position):
            assert self.codes[row][column] is None, "a cell is written twice"
            self.codes[row][column], self.grains[row][column] = code, granularity

    def grids_written(self):
        side = self.grids[-1][0] // self.grids[0][0]
        return self.codes, [row[::side] for row in self.grains[::side]]


def choose(logits, allowed, options, uniform):
    """One of the allowed indices: the best one, or the one in whose share of the distribution `uniform` falls."""
    allowed = sorted(allowed)
    scores = {index: float(logits[index]) for index in allowed}
    if uniform is None:
        return max(allowed, key=scores.get)
    temperature, top_k, top_p = options or (1.0, None, 1.0)
    weights = softmax({index: score / temperature for index, score in scores.items()})
    best_first = sorted(allowed, key=scores.get, reverse=True)
    kept = best_first[:top_k]
    weights = normalise({index: weights[index] for index in kept})
    nucleus, mass = {}, 0.0
    for index in kept:
        if mass >= top_p:
            break
        nucleus[index] = weights[index]
        mass += weights[index]
    weights, mass = normalise(nucleus), 0.0
    for index in sorted(weights):
        mass += weights[index]
        if mass > uniform:
            return index
    return max(weights)


def softmax(scores):
    highest = max(scores.values())
    return normalise({index: math.exp(score - highest) for index, score in scores.items()})


def normalise(weights):
    total = sum(weights.values())
    return {index: weight / total for index, weight in weights.items()}
