"""How a process that has spoken with others ends."""

from __future__ import annotations

import atexit
import time

import torch.distributed as dist


def end_gloo_at_exit() -> None:
    """At its exit this process ends its process group while Python still runs, and lets gloo's threads finish.

    A thread of gloo that lets go of a collective's tensors once the interpreter is going down aborts the process (torch 2.13,
    now and then on a busy machine), and launchers take the whole run down with it. A group that a wrapper of DDP or FSDP
    holds keeps its threads when it is destroyed; asleep, this process leaves them the interpreter, for which they wait.
    """
    atexit.register(_end_gloo)


def _end_gloo() -> None:
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
        time.sleep(0.2)
