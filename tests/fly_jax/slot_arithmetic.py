"""Where a step writes and reads KV, from its packed upload and the block size that its program uses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fly_jax.device.packing import StepShapes
from fly_jax.scheduling.launch import Launch
from fly_jax.scheduling.step import StepPlan


@dataclass(frozen=True)
class Upload:
    """A step's packed upload, taken apart again, with the plan that it was made from."""

    plan: StepPlan
    fields: dict[str, np.ndarray]
    base_tp: int

    @classmethod
    def of(cls, plan: StepPlan, launch: Launch, shapes: StepShapes) -> Upload:
        packed, fields, offset = launch.arrays[launch.key], {}, 0
        for name, sizes in shapes.backbone(launch.key).layout.fields:
            size = int(np.prod(sizes))
            fields[name] = packed[:, offset : offset + size].reshape(len(packed), *sizes)
            offset += size
        return cls(plan, fields, shapes.base_tp)

    def wrong_slots(self, block_tokens: int) -> list[str]:
        """What is wrong with the KV slots of this step if its program has blocks of this many tokens.

        A position's slot is ``(block id, offset)``: ``table[position // size], position % size``. On every rank the
        table must hold exactly the blocks that the row's tokens fill, one more at most, each of them the request's.
        """
        wrong = []
        for index, row in enumerate(self.plan.rows):
            table = row.request.held_table
            for rank, device in enumerate(table.group.rank_order(self.base_tp)):
                uploaded = self.fields["tables"][rank, index].tolist()
                last = row.start + row.count - 1
                filled = last // block_tokens + 1
                where = f"{row.request.request_id} at {last} on rank {rank} (device {device})"
                if uploaded[: table.num_blocks] != table.rows[rank]:
                    wrong.append(f"{where}: not its own blocks")
                if filled > table.num_blocks:
                    wrong.append(f"{where}: slot {filled - 1} of {table.num_blocks} blocks")
                if table.num_blocks > -(-(row.request.num_tokens + 1) // block_tokens):
                    wrong.append(f"{where}: {table.num_blocks} blocks for {row.request.num_tokens} tokens")
        return wrong

    def positions(self) -> list[int]:
        """Positions that are written, in the order of the places."""
        return [position for position in self.fields["positions"][0].tolist() if position >= 0]
