"""Codes and grain map <-> one coarse-to-fine stream (paper section 3.2, figure 4).

A stream is, for each granularity, coarsest first: a start token, its codes, an end token. Every element is a pair of
position (which cell of that granularity's grid) and content (which code). Streams are contiguous for each image and
padded at the end only.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .grain_map_dq import count_codes, expand_grain_map, top_left_cells


@dataclass
class DQStream(ModelOutput):
    """Streams of a batch of images, L the longest one's length.

    Args:
        contents: (B, L) long, code or special token of each element.
        positions: (B, L) long, cell of the element's own grid, or special token.
        granularities: (B, L) long, granularity of each element; padding counts as finest.
        lengths: (B,) long, elements without padding.
    """

    contents: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    granularities: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


@dataclass
class StreamTables:
    """Index tables of a `StreamLayout` on one device; K granularities, F fine cells, S slots.

    The slots are all elements that a stream can have, in stream order: start, every cell, end, for each granularity.
    """

    num_cells: torch.Tensor  # (K,)
    parent: torch.Tensor  # (K, F): the granularity's cell that covers a fine cell
    top_left: torch.Tensor  # (K, F): first fine cell of a granularity's cell; 0 behind the last one
    is_cell: torch.Tensor  # (K, F) bool: the granularity has that many cells
    order: torch.Tensor  # (K, F): the granularity's cells in the training order; behind them, what is no cell
    rank: torch.Tensor  # (K, F): place of a granularity's cell in the training order; F behind the last cell
    region: torch.Tensor  # (K, F): region of a granularity's cell
    opens_region: torch.Tensor  # (K, F) bool: the cell is the first of its region in the training order
    slot_granularity: torch.Tensor  # (S,)
    slot_position: torch.Tensor  # (S,)
    slot_cell: torch.Tensor  # (S,): first fine cell; 0 for special tokens
    slot_content: torch.Tensor  # (S,): the special token; 0 for cells
    slot_is_start: torch.Tensor  # (S,) bool
    slot_is_code: torch.Tensor  # (S,) bool


class StreamLayout:
    """Sizes, special tokens and order of the streams of one configuration.

    Tokens: contents 0 ... N-1 are codes, N pad, N+1 end, N+2+label start; positions 0 ... n_g-1 are the cells of
    granularity g, n_g pad, n_g+1 end, n_g+2+label start. Unconditional streams have label 0.
    """

    def __init__(self, grid_sizes, codebook_size, fine_order="row-first", num_start_tokens=1):
        self.grid_sizes = [tuple(grid) for grid in grid_sizes]
        self.num_granularities = len(self.grid_sizes)
        self.num_cells = [rows * columns for rows, columns in self.grid_sizes]
        self.fine_order = fine_order
        self.content_pad = codebook_size
        self.content_end = codebook_size + 1
        self.content_start = codebook_size + 2
        self.content_vocab_size = self.content_start + num_start_tokens
        self.position_vocab_size = self.num_cells[-1] + 2 + num_start_tokens  # of the finest granularity
        self.longest_stream = self.num_cells[-1] + 2 * self.num_granularities
        self.padding = (self.content_pad, self.num_cells[-1], self.num_granularities - 1)  # as an element
        self._tables = {}

    def tables(self, device):
        """The index tables on a device, made once. (Not in the constructor: models are built on the meta device.)"""
        if device not in self._tables:
            self._tables[device] = self._make_tables(device)
        return self._tables[device]

    def _make_tables(self, device):
        rows, columns = torch.tensor(self.grid_sizes, device=device).t()[..., None]  # (K, 1) each
        num_cells, fine_cells = rows * columns, self.num_cells[-1]
        fine = torch.arange(fine_cells, device=device)
        side = rows[-1] // rows  # of a cell, in fine cells
        parent = fine // columns[-1] // side * columns + fine % columns[-1] // side  # (K, F)

        is_cell = fine < num_cells
        cell = fine.minimum(num_cells - 1)
        row, column = cell // columns, cell % columns
        top_left = torch.where(is_cell, (row * columns[-1] + column) * side, 0)
        inner = rows // rows[0]  # cells on a side of a region
        region = row // inner * columns[0] + column // inner
        key = region if self.fine_order == "region-first" else cell
        order = torch.where(is_cell, key, fine_cells).argsort(dim=1, stable=True)  # of training; what is no cell, last
        rank = torch.where(is_cell, order.argsort(dim=1), fine_cells)
        first = torch.full_like(rank, fine_cells).scatter_reduce(1, region, rank, "amin")  # of each region

        slot_granularity, slot_position, slot_cell, slot_content = self._make_slots(order, top_left)
        return StreamTables(
            num_cells=num_cells[:, 0],
            parent=parent,
            top_left=top_left,
            is_cell=is_cell,
            order=order,
            rank=rank,
            region=region,
            opens_region=(rank == first.gather(1, region)) & is_cell,
            slot_granularity=slot_granularity,
            slot_position=slot_position,
            slot_cell=slot_cell,
            slot_content=slot_content,
            slot_is_start=slot_content == self.content_start,
            slot_is_code=slot_content == 0,
        )

    def _make_slots(self, order, top_left):
        """Granularity, position, first fine cell and special token of every slot, (4, S)."""
        slots = []
        for granularity, cells in enumerate(self.num_cells):
            start = order.new_tensor([granularity, cells + 2, 0, self.content_start])
            codes = order[granularity, :cells]
            codes = [torch.full_like(codes, granularity), codes, top_left[granularity, codes], torch.zeros_like(codes)]
            end = order.new_tensor([granularity, cells + 1, 0, self.content_end])
            slots += [start[:, None], torch.stack(codes), end[:, None]]
        return torch.cat(slots, dim=1)

    def pack(self, codes, grain_map, labels=None) -> DQStream:
        """Streams of codes (B, H, W) and grain map (B, h, w), both long and in range.

        Args:
            labels: (B,) long, of the start tokens; None: 0.
        """
        tables = self.tables(codes.device)
        labels = torch.zeros_like(codes[:, 0, 0]) if labels is None else labels
        fine_grain_map = expand_grain_map(grain_map, self.num_granularities).flatten(1)  # (B, F)
        kept = ~tables.slot_is_code | (fine_grain_map[:, tables.slot_cell] == tables.slot_granularity)  # (B, S)
        start_label = labels[:, None] * tables.slot_is_start
        contents = tables.slot_content + start_label
        contents = torch.where(tables.slot_is_code, codes.flatten(1)[:, tables.slot_cell], contents)
        positions = tables.slot_position + start_label
        granularities = tables.slot_granularity.expand_as(positions)

        lengths = kept.sum(1)
        longest, num_slots = int(lengths.max()), kept.shape[1]
        target = torch.where(kept, kept.cumsum(1) - 1, num_slots)  # what is not kept goes behind the end

        def compact(values, pad):
            out = torch.full((len(values), num_slots + 1), pad, device=values.device)
            return out.scatter(1, target, values)[:, :longest]

        return DQStream(*map(compact, (contents, positions, granularities), self.padding), lengths)

    def unpack(self, contents, positions, lengths):
        """Codes (B, H, W) and grain map (B, h, w) of streams (B, L); the inverse of `pack`.

        Raises:
            ValueError: a stream that is not whole: tokens out of turn, cells uncovered, covered twice, or of mixed
                granularity in a region.
        """
        tables = self.tables(contents.device)
        batch, fine_cells = len(contents), self.num_cells[-1]
        inside = torch.arange(contents.shape[1], device=contents.device) < lengths[:, None]
        is_start = (contents >= self.content_start) & inside
        is_end = (contents == self.content_end) & inside
        is_code = (contents < self.content_pad) & inside
        opened, closed = is_start.cumsum(1), is_end.cumsum(1)
        granularities = (opened - 1).clamp(0, self.num_granularities - 1)
        special = positions - tables.num_cells[granularities]  # below 0 a cell, 0 pad, 1 end, 2 and more start
        fits = torch.where(is_code, (special < 0) & (positions >= 0), special == contents - self.content_pad)
        fits &= (contents >= 0) & (contents != self.content_pad) & (opened - closed == ~is_end)
        fits &= ~is_start | (contents == contents[:, :1])  # one class
        in_turn = (fits | ~inside).all(1)
        in_turn &= (is_start.sum(1) == self.num_granularities) & (is_end.sum(1) == self.num_granularities)
        if not in_turn.all():
            raise ValueError(
                f"stream(s) {(~in_turn).nonzero().flatten().tolist()} are not, for each granularity in turn, a start "
                "token, codes at positions of its grid and an end token"
            )
        cell = tables.top_left[granularities, torch.where(is_code, positions, 0)]  # (B, L)
        behind = torch.where(is_code, cell, fine_cells)  # everything else is written behind the last cell

        def write(values):
            out = values.new_full((batch, fine_cells + 1), -1)
            return out.scatter(1, behind, values)[:, :fine_cells]

        codes, fine_grain_map = write(contents), write(granularities)
        grain_map = fine_grain_map.gather(1, tables.top_left[0, : self.num_cells[0]].expand(batch, -1))
        grain_map = grain_map.view(batch, *self.grid_sizes[0])
        expanded = expand_grain_map(grain_map.clamp(min=0), self.num_granularities)
        covering = top_left_cells(expanded, self.num_granularities).flatten(1)
        whole = (fine_grain_map.gather(1, covering) == expanded.flatten(1)).all(1)
        whole &= is_code.sum(1) == count_codes(grain_map.clamp(min=0))
        if not whole.all():
            broken = (~whole).nonzero().flatten().tolist()
            raise ValueError(f"stream(s) {broken} do not cover every cell exactly once, one granularity a region")
        return codes.gather(1, covering).view(batch, *self.grid_sizes[-1]), grain_map

    def relabel(self, contents, positions, granularities, labels):
        """Contents and positions (B, L) with the start tokens of other labels (B,)."""
        first = self.tables(positions.device).num_cells[granularities] + 2
        return (
            torch.where(contents >= self.content_start, self.content_start + labels[:, None], contents),
            torch.where(positions >= first, first + labels[:, None], positions),
        )


def target_masks(stream, num_granularities):
    """Which elements are targets (1 + K, B, L - 1): of the content loss, and of each granularity's position loss."""
    granularities = stream.granularities[:, 1:]
    inside = torch.arange(granularities.shape[1], device=granularities.device) < stream.lengths[:, None] - 1
    return torch.stack([inside, *(inside & (granularities == i) for i in range(num_granularities))])
