"""Images as sequences of integers for any sequence model, and back: the tokenizer alone, no class, any size."""

from collections.abc import Iterable
from numbers import Integral

import torch
from transformers import BatchEncoding

from ..modeling.grain_map_dq import check_cells, expand_grain_map
from ..modeling.modeling_dqvae import DQVAEEncoderOutput
from ..modeling.modeling_utils_dq import check_indices
from .static_prior import first_cells

PAD, START, ROW, END = range(4)
NUM_SPECIAL = 4


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
    """

    pad_token_id, bos_token_id, eos_token_id = PAD, START, END

    def __init__(self, config, folded=True):
        config = getattr(config, "vae_config", config)
        self.num_granularities = len(config.granularities)
        self.codebook_size = config.codebook_size
        self.folded = folded
        self.first_code = NUM_SPECIAL + self.num_granularities
        self.vocab_size = self.first_code + self.codebook_size * (self.num_granularities if folded else 1)

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
        names = ["input_ids", "attention_mask", "granularities", "positions"]
        return BatchEncoding(dict(zip(names, padded[:2] if self.folded else padded)))

    def from_tokens(self, tokens):
        """The images of sequences, a list with codes (1, H, W) and grain map (1, h, w) of each; the inverse of `to_tokens`.

        Args:
            tokens: a batch of `to_tokens`, or `input_ids` (B, L), or those of one image (L,), as `generate` gives them, or a
                list of sequences of any lengths. What follows END is not read.

        Raises:
            ValueError: a sequence that is no image; the message names the sequence and the place.
        """
        ids = tokens["input_ids"] if hasattr(tokens, "keys") else tokens
        if not isinstance(ids, (list, tuple)):
            ids = torch.as_tensor(ids)
            ids = ids.view(-1, ids.shape[-1]) if ids.dim() > 0 else [ids]
        elif all(isinstance(token, Integral) for token in ids):
            ids = [ids]
        return [self._image(torch.as_tensor(row).flatten().tolist(), number) for number, row in enumerate(ids)]

    def allowed(self, tokens, shape=None):
        """Which tokens may follow, a list: with it as `prefix_allowed_tokens_fn`, all that `generate` samples are images.

        Args:
            tokens: (L,), a sequence so far, from START on.
            shape: (rows, columns) of regions that the image is to have; None: any.

        Raises:
            ValueError: no beginning of an image.
        """
        *_, (allowed, _) = self._read(torch.as_tensor(tokens).tolist(), shape)
        return [token for part in allowed for token in part]

    def _grids(self, encoded):
        """Codes (B, H, W) and grain maps (B, h, w) of one output or row, checked."""
        codes, grain_map = grids_of(encoded)
        grain_map = check_indices("grain_map", grain_map, (None, None, None), self.num_granularities, "cpu")
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

    def _read(self, ids, shape=None):
        """Yield before the first and after each token which may follow, a list of ranges, and the rows of the grain map.

        Raises:
            ValueError: a token that may not; the message names the place.
        """
        granularities = range(NUM_SPECIAL, self.first_code)
        allowed, rows, row, left = [range(START, START + 1)], [], [], None  # left: codes of each granularity
        yield allowed, rows
        for place, token in enumerate(ids):
            if not any(token in part for part in allowed):
                raise ValueError(f"token {token} at place {place} cannot stand there")
            if token in granularities:
                row.append(token - NUM_SPECIAL)
            elif token == ROW:
                rows.append(row)
                row = []
            elif token >= self.first_code:
                left = left or [4**g * sum(line.count(g) for line in rows) for g in range(self.num_granularities)]
                left[next(g for g, count in enumerate(left) if count)] -= 1
            if token in (END, PAD):
                allowed = [range(PAD, PAD + 1)]
            elif left is None:
                allowed = self._after_map(rows, row, shape)
            elif any(left):
                allowed = [self._codes(next(g for g, count in enumerate(left) if count))]
            else:
                allowed = [range(END, END + 1)]
            yield allowed, rows

    def _after_map(self, rows, row, shape):
        """What may follow in the grain map, or behind it."""
        width = len(rows[0]) if rows else None if shape is None else shape[1]
        if row:
            end_of_row = [range(ROW, ROW + 1)] if width in (None, len(row)) else []
            return end_of_row + ([] if len(row) == width else [range(NUM_SPECIAL, self.first_code)])
        may_end = rows and (shape is None or len(rows) == shape[0])
        coarsest = min((g for line in rows for g in line), default=0)
        may_go_on = shape is None or len(rows) < shape[0]
        return [self._codes(coarsest)] * bool(may_end) + [range(NUM_SPECIAL, self.first_code)] * may_go_on

    def _codes(self, granularity):
        """The tokens of a granularity's codes."""
        first = self.first_code + self.codebook_size * granularity * self.folded
        return range(first, first + self.codebook_size)

    def _image(self, ids, number):
        """Codes and grain map of one sequence."""
        ids = ids[: ids.index(END) + 1] if END in ids else ids
        try:
            *_, (_, rows) = self._read(ids)
        except ValueError as error:
            raise ValueError(f"sequence {number} is no image: {error}") from error
        if END not in ids:
            raise ValueError(f"sequence {number} is no image: it ends before the token of the end, {END}")
        grain_map = torch.tensor(rows)
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


def grids_of(encoded):
    """Codes (B, H, W) and grain maps (B, h, w) of one output or row; TypeError where they are missing."""
    try:
        grids = [torch.as_tensor(encoded[name]) for name in ("codes", "grain_map")]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise TypeError(
            "encoded must have codes and grain_map, as DQVAEModel.encode gives them, or be a list of such"
        ) from error
    return [grid if grid.dim() == 3 else grid[None] for grid in grids]
