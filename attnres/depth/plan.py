"""Which depth sources each read sees, for every source convention: the one place that knows.

A source is named by what it sums: the token embedding (or not) and a run of consecutive sublayer outputs. Two sources
with the same name are the same vector, so duplicates, families and eligibility follow from the plan alone.

The running state resets where a block opens: `DepthPlan.reads` says at which read, `DepthPlan.resets` under which
conventions. The model follows it in `attnres.model.routing.open_block`.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Convention = Literal["block_sum", "seeded_block_sum", "cumulative", "full"]
CONVENTIONS: tuple[Convention, ...] = ("block_sum", "seeded_block_sum", "cumulative", "full")
Sublayer = Literal["attn", "mlp", "final"]


@dataclass(frozen=True)
class Source:
    """A depth source: `embedding` (if set) plus the outputs of sublayers `start .. stop-1`."""

    embedding: bool
    start: int = 0
    stop: int = 0

    def __str__(self) -> str:
        outputs = f"o{self.start}..o{self.stop - 1}" if self.stop > self.start + 1 else f"o{self.start}"
        return "+".join(["emb"] * self.embedding + [outputs] * (self.stop > self.start))


@dataclass(frozen=True)
class ReadPlan:
    """One read.

    Attributes:
        index: read number `j`; read `j` makes the input of sublayer `j`, read `2L` the final one.
        layer: the layer it belongs to; L for the final read.
        sublayer: what it feeds: `"attn"`, `"mlp"` or `"final"`.
        block: index of the block whose finished sources it reads.
        index_in_block: position among the reads of that block.
        sources: what it sees, oldest first.
        has_current: whether the newest source is the running state (else a finished block).
    """

    index: int
    layer: int
    sublayer: Sublayer
    block: int
    index_in_block: int
    sources: tuple[Source, ...]
    has_current: bool

    @property
    def num_sources(self) -> int:
        return len(self.sources)

    @property
    def starts_block(self) -> bool:
        """Whether the running state is pushed as a finished source before this read."""
        return self.index_in_block == 0


@dataclass(frozen=True)
class DepthPlan:
    """The reads of a model of `num_layers` layers in `num_blocks` blocks under one source convention.

    A block spans `m = ceil(num_layers / num_blocks)` layers, so there can be fewer real blocks than asked for
    (28 layers in 8 blocks: m = 4, 7 real blocks). Conventions: `block_sum` (Attention Residuals, arXiv 2603.15031,
    Block AttnRes), `full` (the same with blocks of one sublayer), `seeded_block_sum` (the first block's sum starts
    from the embedding) and `cumulative` (the running state is the whole residual stream and is never reset).

    Raises:
        ValueError: for sizes or a convention that make no plan.
    """

    num_layers: int
    num_blocks: int
    convention: Convention = "block_sum"

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ValueError(f"attnres_sources: expected one of {', '.join(CONVENTIONS)}, received {self.convention!r}")
        if self.num_layers < 1:
            raise ValueError(f"num_hidden_layers: expected at least 1, received {self.num_layers}")
        if not 1 <= self.num_blocks <= self.num_layers:
            raise ValueError(
                f"attnres_num_blocks: expected 1 to num_hidden_layers ({self.num_layers}), received {self.num_blocks}"
            )

    @property
    def layers_per_block(self) -> int:
        return math.ceil(self.num_layers / self.num_blocks)

    @property
    def num_real_blocks(self) -> int:
        return math.ceil(self.num_layers / self.layers_per_block)

    @property
    def seeded(self) -> bool:
        """Whether the running state starts as the embedding (else empty)."""
        return self.convention in ("seeded_block_sum", "cumulative")

    @property
    def resets(self) -> bool:
        """Whether the running state starts empty again when it has been pushed."""
        return self.convention != "cumulative"

    @property
    def has_final_read(self) -> bool:
        """Whether the last norm sees a routed mix (else the running state itself)."""
        return self.convention != "cumulative"

    @cached_property
    def reads(self) -> tuple[ReadPlan, ...]:
        """All reads in order: two a layer, then the final one where the convention has it."""
        sublayers = 2 * self.num_layers
        block_length = 1 if self.convention == "full" else 2 * self.layers_per_block
        finished = [Source(embedding=True)]
        current: Source | None = Source(embedding=True) if self.seeded else None
        reads: list[ReadPlan] = []
        block = index_in_block = 0
        for j in range(sublayers + self.has_final_read):
            # The final read joins the last block instead of opening one, so that it needs no preparation of its own.
            opens = j > 0 and j % block_length == 0 and (j < sublayers or block_length == 1)
            if opens and current is not None:
                # The running state is pushed as a finished source, and resets.
                finished.append(current)
                current = None if self.resets else current
                block, index_in_block = block + 1, 0
            sublayer: Sublayer = "final" if j == sublayers else ("attn", "mlp")[j % 2]
            sources = (*finished, *([current] if current is not None else []))
            reads.append(ReadPlan(j, j // 2, sublayer, block, index_in_block, sources, current is not None))
            index_in_block += 1
            current = Source(False, j, j + 1) if current is None else Source(current.embedding, current.start, j + 1)
        return tuple(reads)

    @cached_property
    def blocks(self) -> tuple[tuple[ReadPlan, ...], ...]:
        """The reads grouped by block: those of one group share their finished sources."""
        groups: list[list[ReadPlan]] = []
        for read in self.reads:
            if read.starts_block:
                groups.append([])
            groups[-1].append(read)
        return tuple(tuple(group) for group in groups)

    def layer_reads(self, layer: int) -> tuple[ReadPlan, ReadPlan]:
        """The attention read and the MLP read of a layer."""
        return self.reads[2 * layer], self.reads[2 * layer + 1]

    def routing_is_trainable(self, read: ReadPlan) -> bool:
        """Whether the weights of a read can depend on anything: not with one source, nor with equal ones."""
        return len(set(read.sources)) > 1
