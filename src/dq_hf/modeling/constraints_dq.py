"""What may come next in a stream: the rules that sampling and code lengths share (paper section 3.2)."""

import copy

import torch

from .sequence_dq import DQStream

# What a `StreamState` has of every image.
ROWS = ("labels", "taken", "codes", "fine_grain_map", "granularity", "start_is_next", "finished", "finite", "lengths")


class StreamState:
    """The streams of a batch while they are generated: what may come next, and what came.

    All images advance one element a step, each on its own clock: one may be in its fine part while its neighbour is
    still coarse. What is not free to choose (start, end when nothing is left, padding behind the end, fixed fine
    positions) is allowed alone, so that drawing is one operation for all. Nothing here waits for the device.

    With `ascending`, only what training streams have: the cells of a granularity in the training order, so that a cell
    which is skipped is thereby finer, and none that would leave a region half covered.

    Differs: with three or more granularities, a granularity's end is allowed only while no region is half covered;
    such a region has no place in a grain map, and the tokenizer never makes one.
    """

    def __init__(self, layout, labels, fixed_fine_positions=True, ascending=False):
        """
        Args:
            layout: `StreamLayout`.
            labels: (B,) long, of the start tokens.
            fixed_fine_positions: the finest codes fill what is left, in the training order; False: they are free.
            ascending: cells come in the training order in the coarser granularities, too; for all, or (B,) bool.
        """
        self.layout = layout
        self.tables = layout.tables(labels.device)
        self.labels = labels
        self.fixed_fine_positions = fixed_fine_positions
        self.ascending = (
            None if ascending is False else torch.as_tensor(ascending, device=labels.device).expand_as(labels)
        )
        self.position_ids = torch.arange(layout.position_vocab_size, device=labels.device)
        self.content_ids = torch.arange(layout.content_vocab_size, device=labels.device)
        batch, fine_cells = len(labels), layout.num_cells[-1]
        self.taken = torch.zeros(batch, fine_cells, dtype=torch.bool, device=labels.device)
        self.codes = torch.zeros(batch, fine_cells, dtype=torch.long, device=labels.device)
        self.fine_grain_map = torch.zeros_like(self.codes)
        self.granularity = torch.zeros_like(labels)  # of the next element
        self.start_is_next = torch.ones_like(labels, dtype=torch.bool)
        self.finished = torch.zeros_like(self.start_is_next)
        self.finite = ~self.finished  # whether all logits so far were
        self.lengths = torch.zeros_like(labels)
        # Contents, positions and granularities (3, B, L) of all elements; with a column for what comes after the end.
        padding = torch.stack([self.lengths + token for token in layout.padding])
        self.elements = padding[..., None].repeat(1, 1, layout.longest_stream + 1)
        self.last = padding.unbind()  # of the last element, which is none yet

    @property
    def is_finest(self):
        """Of which streams the next element is of the finest granularity, (B,) bool."""
        return self.granularity == self.layout.num_granularities - 1

    def allowed_positions(self):
        """Which positions the next element may have, (B, position vocabulary) bool; at least one each."""
        cells, end = self.allowed_cells_and_end()
        num_cells = self.tables.num_cells[self.granularity]
        allowed = torch.nn.functional.pad(cells, (0, len(self.position_ids) - cells.shape[1]))
        allowed |= (self.position_ids == (num_cells + 1)[:, None]) & end[:, None]
        forced = torch.where(self.finished, num_cells, num_cells + 2 + self.labels)  # pad or start
        is_forced = self.finished | self.start_is_next
        return torch.where(is_forced[:, None], self.position_ids == forced[:, None], allowed)

    def allowed_cells_and_end(self):
        """What of the present granularity may come next where neither start nor padding must.

        Returns:
            Its cells, (B, F) bool, and its end, (B,) bool.
        """
        cells, is_finest, half_covered = self._free_cells(), self.is_finest, self._half_covered()
        if self.fixed_fine_positions:
            rank = self.tables.rank[-1]
            first = torch.where(cells, rank, len(rank)).amin(1, keepdim=True)
            cells &= (rank == first) | ~is_finest[:, None]
        if self.ascending is not None:
            cells &= self._in_order(cells, half_covered) | (is_finest | ~self.ascending)[:, None]
        return cells, torch.where(is_finest, self.taken.all(1), ~half_covered.any(1))

    def allowed_contents(self, positions):
        """Which contents go with positions of the present granularity: (B, content vocabulary) bool for (B,).

        And (B, L, content vocabulary) for (B, L).
        """
        special = self._special(positions)[..., None]
        is_code = self.content_ids < self.layout.content_pad
        return torch.where(special >= 0, self.content_ids == self.layout.content_pad + special, is_code)

    def positions_are_fixed(self):
        """Of which streams all positions that are still to come are known, (B,) bool."""
        if not self.fixed_fine_positions:
            return self.finished
        return self.is_finest & ~self.start_is_next

    def steer(self, logits):
        """Position logits (B, V), changed by what is known of the stream; here nothing is."""
        return logits

    def watch(self, logits):
        """The logits (B, ..., V), once `finite` knows of them."""
        self.finite &= logits.isfinite().flatten(1).all(1)
        return logits

    def append(self, positions, contents):
        """Write the chosen element (B,), (B,) into the grids and move on."""
        self.last = (contents, positions, self.granularity)
        covered = self.tables.parent[self.granularity] == positions[:, None]  # (B, F)
        covered &= (contents < self.layout.content_pad)[:, None]
        self.codes = torch.where(covered, contents[:, None], self.codes)
        self.fine_grain_map = torch.where(covered, self.granularity[:, None], self.fine_grain_map)
        self.taken = self.taken | covered
        self.elements.scatter_(2, self.lengths.expand(3, -1)[..., None], torch.stack(self.last)[..., None])
        self.lengths = self.lengths + ~self.finished
        is_end, is_finest = contents == self.layout.content_end, self.is_finest
        self.finished |= is_end & is_finest
        self.start_is_next = is_end & ~is_finest
        self.granularity = self.granularity + self.start_is_next  # not in place: `last` holds the old one

    def stream(self):
        """The elements so far, a `DQStream`."""
        elements = self.elements[:, :, : int(self.lengths.max())]
        inside = torch.arange(elements.shape[2], device=elements.device) < self.lengths[:, None]
        columns = [torch.where(inside, column, token) for column, token in zip(elements, self.layout.padding)]
        return DQStream(*columns, self.lengths)

    def grids(self):
        """Codes (B, H, W) and grain map (B, h, w) written so far."""
        batch = len(self.codes)
        corners = self.tables.top_left[0, : self.layout.num_cells[0]]
        grain_map = self.fine_grain_map[:, corners].view(batch, *self.layout.grid_sizes[0])
        return self.codes.view(batch, *self.layout.grid_sizes[-1]), grain_map

    def select(self, rows):
        """The streams of some rows, an index or a slice, as a state of its own."""
        chosen = copy.copy(self)
        for name in ROWS:
            setattr(chosen, name, getattr(self, name)[rows])
        chosen.ascending = None if self.ascending is None else self.ascending[rows]
        chosen.elements = self.elements[:, rows]
        chosen.last = tuple(column[rows] for column in self.last)
        return chosen

    def last_rank(self):
        """Place (B,) of the last element in the training order of its granularity; -1 if it is no cell."""
        contents, positions, granularities = self.last
        rank = self.tables.rank[granularities]
        place = positions.clamp(max=rank.shape[1] - 1)[:, None]
        return torch.where(contents < self.layout.content_pad, rank.gather(1, place)[:, 0], -1)

    def _special(self, positions):
        """What positions (B,) or (B, L) of the present granularity mean: below 0 a cell, 0 pad, 1 end, 2 and more a start."""
        return (positions.t() - self.tables.num_cells[self.granularity]).t()

    def _free_cells(self):
        """Cells of the present granularity without a code, (B, F) bool."""
        return ~self.taken.gather(1, self.tables.top_left[self.granularity]) & self.tables.is_cell[self.granularity]

    def _in_order(self, free, half_covered):
        """The free cells (B, F) that may come in ascending order: behind the last one, and no later than one that must."""
        rank, region = self.tables.rank[self.granularity], self.tables.region[self.granularity]  # (B, F)
        begun = half_covered.gather(1, region)
        due = torch.where(free & begun, rank, rank.shape[1]).amin(1, keepdim=True)  # of a region that is half covered
        may_come = self.tables.opens_region[self.granularity] | begun
        return may_come & (rank > self.last_rank()[:, None]) & (rank <= due)

    def _half_covered(self):
        """Which regions are covered in part, (B, regions) bool; none in the coarsest granularity."""
        (rows, columns), fine_rows = self.layout.grid_sizes[0], self.layout.grid_sizes[-1][0]
        side = fine_rows // rows
        cells = self.taken.view(-1, rows, side, columns, side).transpose(2, 3).flatten(3)  # (B, h, w, side^2)
        return (cells.any(-1) & ~cells.all(-1)).flatten(1)
