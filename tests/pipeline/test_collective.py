"""Proves that the sum by shared memory is the sum: the same bytes at every rank, for any number of ranks, in bounded
time when one does not come. Real processes, torch's own all-reduce beside it."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import collective
from pipeline.collective import SHARED_MEMORY, SharedSum, open_sum

SIZE, TURNS = 61_706, 50


def join(rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)


def add_up(rank: int, world_size: int, folder: Path) -> None:
    """Leaves the sums of many turns, and those of gloo."""
    torch.set_num_threads(1)
    join(rank, world_size, folder)
    sum_up = open_sum(SIZE, torch.device("cpu"), one_host=True)
    assert isinstance(sum_up, SharedSum)
    generator = torch.Generator().manual_seed(rank)
    ours, theirs = [], []
    for turn in range(TURNS):
        mine = torch.randn(SIZE, generator=generator)
        if turn % 10 == rank:
            time.sleep(0.05)  # now one is late, now another
        ours.append(mine.clone())
        sum_up(ours[-1])
        if turn % 10 == 0:
            theirs.append(mine)
            dist.all_reduce(theirs[-1])
    torch.testing.assert_close(torch.stack(ours[::10]), torch.stack(theirs), rtol=1e-5, atol=1e-5)
    (folder / f"{rank}.bytes").write_bytes(torch.stack(ours).numpy().tobytes())


def stay_away(rank: int, world_size: int, folder: Path) -> None:
    """The last rank leaves after three turns; the others say so."""
    join(rank, world_size, folder)
    collective.PATIENCE_S = 1
    sum_up = SharedSum(10)
    for _ in range(3):
        sum_up(torch.ones(10))
    if rank == world_size - 1:
        return
    with pytest.raises(RuntimeError, match=rf"rank {rank} waited 1 s for gradients of ranks \[{world_size - 1}\]"):
        sum_up(torch.ones(10))
    (folder / f"{rank}.seen").touch()


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_sum_in_the_same_bytes(tmp_path: Path, world_size: int) -> None:
    before = set(SHARED_MEMORY.glob("lenet-*"))
    mp.spawn(add_up, (world_size, tmp_path), nprocs=world_size)
    found = {path.read_bytes() for path in tmp_path.glob("*.bytes")}
    assert len(list(tmp_path.glob("*.bytes"))) == world_size
    assert [len(content) for content in found] == [TURNS * SIZE * 4]
    assert set(SHARED_MEMORY.glob("lenet-*")) <= before  # nothing stays, however the processes may end


def test_a_rank_that_does_not_come_is_named_in_bounded_time(tmp_path: Path) -> None:
    started = time.monotonic()
    mp.spawn(stay_away, (3, tmp_path), nprocs=3)
    assert time.monotonic() - started < 60
    assert {path.name for path in tmp_path.glob("*.seen")} == {"0.seen", "1.seen"}


def test_ranks_on_several_hosts_or_gpus_use_torchs_backend() -> None:
    assert open_sum(10, torch.device("cpu"), one_host=False) is dist.all_reduce
    assert open_sum(10, torch.device("cuda"), one_host=True) is dist.all_reduce
