"""Runs a function on two gloo ranks, each a process of its own."""

import os
import tempfile

import torch
import torch.multiprocessing


def _worker(rank: int, folder: str, function, arguments) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        result = function(rank, torch.distributed.group.WORLD, *arguments)
        torch.save(result, os.path.join(folder, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


def on_two_ranks(function, *arguments) -> list:
    """[function(rank, group, *arguments) for both ranks]; `function` must be importable."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, args=(folder, function, arguments), nprocs=2)
        return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(2)]
