"""What all processes of a run have, for those who know of no processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def from_all(rows: Tensor) -> Tensor:
    """[n, ...] of each process -> [processes n, ...] in rank order, the same everywhere; `rows` itself in a run of one.

    A collective: all processes call it, with tensors of one shape. Rows that belong to samples should bring their positions in
    the global batch along.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    found = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(found, rows.contiguous())
    return torch.cat(found)
