"""Images as sequences of integers for any sequence model, and back: the tokenizer alone, no class, any size."""

from collections.abc import Iterable
from itertools import chain
from numbers import Integral

import numpy as np
import torch
from transformers import BatchEncoding

from ..modeling.grain_map_dq import check_cells, expand_grain_map
from ..modeling.modeling_dqvae import DQVAEEncoderOutput
from ..modeling.modeling_utils_dq import INTEGERS, check_indices
from .static_prior import first_cells

PAD, START, ROW, END = range(4)
NUM_SPECIAL = 4
MOST_OPEN = 2**14  # unfinished sequences of which `allowed` remembers what it has read


class DQTokens:
    """The vocabulary of an image tokenizer's codes as one flat sequence, coarse to fine.

    A sequence is START; the grain map, region by region, with ROW behind each row; the codes, coarsest granularity first,
    each granularity row by row; END. Position is the place in this order. With `folded` a code's number tells its
    granularity, too: 4 special tokens, one token for each granularity, N codes for each granularity. Without, all
    granularities share N tokens, and granularity and position stand apart, in columns of their own, for a model that embeds
    them.

    Args:
        config: `DQVAEConfig`, or the `DQConfig` of a whole model.
        folded: False: granularity and position apart.
        offset: is added to all tokens, for a model whose own vocabulary ends before: `vocab_size` is then the size of both.
    """

    def __init__(self, config, folded=True, offset=0):
        config = getattr(config, "vae_config", config)
        if not hasattr(config, "granularities"):
            raise TypeError(
                f"config must be a DQVAEConfig, or the DQConfig of a whole model, got {type(config).__name__}; of a model, "
                "give its config"
            )
        if isinstance(offset, bool) or not isinstance(offset, Integral) or offset < 0:
            raise ValueError(f"offset must be a whole number of at least 0, got {offset!r}")
        self.num_granularities = len(config.granularities)
        self.codebook_size = config.codebook_size
        self.folded, self.offset = folded, offset
        self.first_code = NUM_SPECIAL + self.num_granularities  # without the offset
        self.vocab_size = offset + self.first_code + self.codebook_size * (self.num_granularities if folded else 1)
        self.pad_token_id, self.bos_token_id, self.eos_token_id = (offset + token for token in (PAD, START, END))
        self._open = {}  # {(shape, its tokens): `Sequence`}, of what `allowed` has read

    def __getstate__(self):
        """As in Python, without what has been read: a `map` of datasets tells a new function from an old one by this."""
        return self.__dict__ | {"_open": {}}

    def to_tokens(self, encoded):
        """A padded batch for a model of transformers, a `BatchEncoding` of long tensors.

        Args:
            encoded: what `DQVAEModel.encode` gave, or several such, of any sizes; or rows with "codes" (H, W) and
                "grain_map" (h, w), as `dq-hf encode --output` writes them and `load_rows` reads them.

        Returns:
            input_ids (B, L); attention_mask (B, L), 0 where there is padding; not folded also granularities (B, L) of codes
            and grain map, and positions (B, L, 2): row and column on the finest grid of the first cell of what a token
            stands for. Both are 0 for special tokens.

        Raises:
            TypeError, ValueError: no codes or grain map, or of another type, shape or range, or that do not belong together.
        """
        is_one = hasattr(encoded, "keys") or not isinstance(encoded, Iterable)
        images = [image for each in ([encoded] if is_one else encoded) for image in zip(*self._grids(each))]
        if not images:
            raise ValueError("encoded must hold at least one image, got none")
        columns = [self._columns(codes, grain_map) for codes, grain_map in images]
        padded = [torch.nn.utils.rnn.pad_sequence(column, batch_first=True) for column in zip(*columns)]
        padded[0] += self.offset
        names = ["input_ids", "attention_mask", "granularities", "positions"]
        return BatchEncoding(dict(zip(names, padded[:2] if self.folded else padded)))

    def from_tokens(self, tokens, strict=True):
        """The images of sequences, a list with codes (1, H, W) and grain map (1, h, w) of each; the inverse of `to_tokens`.

        Args:
            tokens: a batch of `to_tokens`, or `input_ids` (B, L), or those of one image (L,), as `generate` gives them, or
                any number of sequences of any lengths, or of such batches. An image begins with the last START of a sequence;
                what stands before, such as a prompt, or behind END is not read.
            strict: False: in the place of a sequence that is no image there is None.

        Raises:
            TypeError: no whole numbers.
            ValueError: no sequence, or one that is no image; the message names the sequence and the place.
        """
        if hasattr(tokens, "keys"):
            named = [name for name in ("input_ids", "sequences") if name in tokens.keys()]
            if not named:
                raise TypeError(f"tokens must have input_ids, or sequences as generate gives them, got {list(tokens)}")
            tokens = tokens[named[0]]
        images = []
        for number, sequence in enumerate(sequences_of(tokens)):
            try:
                images.append(self._image(*self._from_start(sequence)))
            except ValueError as error:
                if strict:
                    raise ValueError(f"sequence {number} is no image: {error}") from error
                images.append(None)
        return images

    def allowed(self, tokens, shape=None):
        """Which tokens may follow, a list: with it as `prefix_allowed_tokens_fn`, all that `generate` samples are images.

        Args:
            tokens: (L,), a sequence so far. What stands before the last START is not read, and without
                one only START may follow; behind END there is only padding, and behind what is no beginning of an image,
                too: beam search goes on with such sequences where there are fewer others than beams, at probability 0.
            shape: (rows, columns) of regions that the image is to have; None: any.

        Raises:
            TypeError: no whole numbers, or a shape that is no pair of such.
        """
        if shape is not None:
            shape = tuple(shape) if isinstance(shape, Iterable) else (shape,)
            if len(shape) != 2 or not all(isinstance(side, Integral) and side > 0 for side in shape):
                raise TypeError(f"shape must be rows and columns of regions, two whole numbers, got {shape}")
        ids, first = self._from_start(whole_numbers(tokens))
        if not ids:
            return [self.bos_token_id]
        if END in ids:
            self._open.pop((shape, *ids[: ids.index(END)]), None)
            return [self.pad_token_id]
        sequence = self._open.pop((shape, *ids[:-1]), None) or Sequence(self, shape)
        try:
            for token in ids[sequence.length :]:
                sequence.read(token, first)
        except ValueError:
            return [self.pad_token_id]
        if len(self._open) >= MOST_OPEN:
            self._open.clear()
        self._open[shape, *ids] = sequence
        return [token + self.offset for token in chain(*sequence.allowed)]

    def places(self, tokens):
        """granularities (L,) and positions (L, 2), as `to_tokens` gives them, of a sequence (L,) so far.

        Both are 0 for what stands before the last START, or behind END.

        Raises:
            TypeError: no whole numbers.
            ValueError: no beginning of an image.
        """
        tokens = whole_numbers(tokens)
        ids, first = self._from_start(tokens)
        ids = ids[: ids.index(END)] if END in ids else ids
        sequence = Sequence(self)
        for token in ids:
            sequence.read(token, first)
        rows = [row for row in (*sequence.rows, sequence.row) if row] or [[0]]
        rows = [row + [0] * (len(rows[0]) - len(row)) for row in rows]  # as if it went on coarsely
        side = 2 ** (self.num_granularities - 1)
        codes = torch.zeros(len(rows) * side, len(rows[0]) * side, dtype=torch.long)
        _, _, *columns = self._columns(codes, torch.tensor(rows))
        whole = [column.new_zeros(len(tokens), *column.shape[1:]) for column in columns]
        for column, known in zip(whole, columns):
            column[first : first + len(ids)] = known[: len(ids)]
        return BatchEncoding(dict(zip(["granularities", "positions"], whole)))

    def _grids(self, encoded):
        """Codes (B, H, W) and grain maps (B, h, w) of one output or row, checked."""
        codes, grain_map = grids_of(encoded)
        grain_map = check_indices("grain_map", grain_map, ("B", "h", "w"), self.num_granularities, "cpu")
        batch, *regions = grain_map.shape
        grid = [side * 2 ** (self.num_granularities - 1) for side in regions]
        codes = check_indices("codes", codes, (batch, *grid), self.codebook_size, "cpu")
        check_cells(codes, grain_map, self.num_granularities)
        return codes, grain_map

    def _columns(self, codes, grain_map):
        """Columns of one image: ids (L,), ones (L,), granularities (L,), positions (L, 2)."""
        side = 2 ** (self.num_granularities - 1)
        _, order = self._order(grain_map)
        of_codes = expand_grain_map(grain_map, self.num_granularities).flatten()[order]
        code_ids = self.first_code + codes.flatten()[order] + self.codebook_size * of_codes * self.folded
        rows, columns = grain_map.shape
        map_ids = torch.nn.functional.pad(NUM_SPECIAL + grain_map, (0, 1), value=ROW).flatten()
        map_granularities = torch.nn.functional.pad(grain_map, (0, 1)).flatten()
        map_places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns + 1)) * side
        map_places[map_ids == ROW] = 0
        code_places = torch.stack([order // codes.shape[1], order % codes.shape[1]], 1)

        def framed(*parts, first=0, last=0):
            edge = parts[0].new_ones((1, *parts[0].shape[1:]))
            return torch.cat([first * edge, *parts, last * edge])

        ids = framed(map_ids, code_ids, first=START, last=END)
        return ids, torch.ones_like(ids), framed(map_granularities, of_codes), framed(map_places, code_places)

    def _from_start(self, sequence):
        """Its tokens from the last START on, without the offset, and how many stand before."""
        ids = [token - self.offset for token in sequence]
        first = len(ids) - 1 - ids[::-1].index(START) if START in ids else len(ids)
        return ids[first:], first

    def codes_of(self, granularity):
        """The tokens of a granularity's codes."""
        first = self.first_code + self.codebook_size * granularity * self.folded
        return range(first, first + self.codebook_size)

    def _image(self, ids, first):
        """Codes and grain map of one sequence, see `_from_start`."""
        if not ids:
            raise ValueError(f"it has no token of the start, {self.bos_token_id}")
        ids = ids[: ids.index(END) + 1] if END in ids else ids
        sequence = Sequence(self)
        for token in ids:
            sequence.read(token, first)
        if ids[-1] != END:
            raise ValueError(f"it ends before the token of the end, {self.eos_token_id}")
        grain_map = torch.tensor(sequence.rows)
        codes = (torch.tensor([i for i in ids if i >= self.first_code]) - self.first_code) % self.codebook_size
        top_left, order = self._order(grain_map)
        grid = torch.zeros_like(top_left).flatten()
        grid[order] = codes
        return DQVAEEncoderOutput(codes=grid[top_left][None], grain_map=grain_map[None])

    def _order(self, grain_map):
        """Raster indices on the finest grid: of each cell's code (H, W), and of the codes, coarsest granularity first."""
        top_left, is_first = first_cells(grain_map, self.num_granularities)
        fine_map = expand_grain_map(grain_map, self.num_granularities)
        places = torch.arange(top_left.numel()).view(top_left.shape)
        return top_left, torch.cat([places[is_first & (fine_map == g)] for g in range(self.num_granularities)])


class Sequence:
    """A sequence that is read token by token.

    Args:
        tokens: `DQTokens`.
        shape: (rows, columns) of regions; None: any.

    Attributes:
        length: tokens that were read.
        rows: of the grain map, those that are whole; `row`: the one that is being read.
        allowed: which tokens may come next, a list of ranges, without the offset.
    """

    def __init__(self, tokens, shape=None):
        self.tokens, self.shape, self.length = tokens, shape, 0
        self.rows, self.row = [], []
        self.left = None  # codes of each granularity that are still to come, once the grain map is whole
        self.allowed = [range(START, START + 1)]

    def read(self, token, first=0):
        """Read the next token; ValueError if it may not come, with its place, where START is at the place `first`."""
        tokens = self.tokens
        if not any(token in part for part in self.allowed):
            raise ValueError(f"token {token + tokens.offset} at place {first + self.length} cannot stand there")
        self.length += 1
        if token >= tokens.first_code:
            if self.left is None:
                self.left = [4**g * sum(row.count(g) for row in self.rows) for g in range(tokens.num_granularities)]
            self.left[self._granularity()] -= 1
        elif token == ROW:
            self.rows.append(self.row)
            self.row = []
        elif token >= NUM_SPECIAL:
            self.row.append(token - NUM_SPECIAL)
        if self.left is None:
            self.allowed = self._in_map()
        elif any(self.left):
            self.allowed = [tokens.codes_of(self._granularity())]
        else:
            self.allowed = [range(END, END + 1)]

    def _granularity(self):
        """Of the next code."""
        return next(g for g, count in enumerate(self.left) if count)

    def _in_map(self):
        """What may follow in the grain map, or behind it."""
        num_rows, num_columns = self.shape or (None, len(self.rows[0]) if self.rows else None)  # None: any number
        regions, allowed = range(NUM_SPECIAL, self.tokens.first_code), []
        if self.row:
            if num_columns in (None, len(self.row)):
                allowed.append(range(ROW, ROW + 1))
            if num_columns != len(self.row):
                allowed.append(regions)
        else:
            if self.rows and num_rows in (None, len(self.rows)):
                allowed.append(self.tokens.codes_of(min(map(min, self.rows))))
            if num_rows != len(self.rows):
                allowed.append(regions)
        return allowed


def sequences_of(ids):
    """Lists of whole numbers from a tensor or array (B, L) or (L,), or from any number of sequences.

    Raises:
        TypeError, ValueError: others, or none.
    """
    if isinstance(ids, (torch.Tensor, np.ndarray)) and ids.dtype != object:
        sequences = [ids] if ids.ndim < 2 else ids.reshape(-1, ids.shape[-1]) if ids.shape[-1] else []
    elif isinstance(ids, Iterable) and not isinstance(ids, str):
        sequences = list(ids)
        if sequences and all(isinstance(token, Integral) or getattr(token, "ndim", None) == 0 for token in sequences):
            sequences = [sequences]
    else:
        raise TypeError(f"tokens must be a sequence of whole numbers or several such, got {type(ids).__name__}")
    if len(sequences) == 0:
        raise ValueError("tokens must hold at least one sequence, got none")
    return [whole_numbers(row) for sequence in sequences for row in rows_of(sequence)]


def rows_of(sequence):
    """The sequences of one, or of a batch of such."""
    is_batch = getattr(sequence, "ndim", None) == 2 or (
        isinstance(sequence, (list, tuple)) and sequence and is_nested(sequence)
    )
    return sequence if is_batch else [sequence]


def is_nested(sequence):
    """Whether a list has lists, tuples or rows for elements."""
    return all(isinstance(part, (list, tuple)) or getattr(part, "ndim", 0) == 1 for part in sequence)


def whole_numbers(sequence):
    """A sequence as a flat list of numbers; TypeError if they are not whole."""
    try:
        tensor = torch.as_tensor(sequence)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"tokens must be a sequence of whole numbers, got {type(sequence).__name__}") from None
    if tensor.numel() and tensor.dtype not in INTEGERS:
        raise TypeError(f"tokens must be whole numbers, got {tensor.dtype}")
    if max(tensor.shape, default=1) < tensor.numel():
        raise ValueError(f"tokens must be one sequence, got shape {tuple(tensor.shape)}")
    return tensor.flatten().tolist()


def grids_of(encoded):
    """Codes (B, H, W) and grain maps (B, h, w) of one output or row; TypeError where they are missing."""
    try:
        names = encoded.keys()
        map_name = "grain_maps" if "grain_maps" in names else "grain_map"  # the former of a `DQPipelineOutput`
        grids = [torch.as_tensor(encoded[name]) for name in ("codes", map_name)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TypeError(
            "encoded must have codes and grain_map, as DQVAEModel.encode gives them, each of one size, or be a list of such: "
            "rows of several sizes are given one by one"
        ) from error
    return [grid if grid.dim() == 3 else grid[None] for grid in grids]
