"""Proves that the sum by shared memory is the sum: the same bytes at every rank, for any number of ranks, in bounded
time when one does not come. Real processes, torch's own all-reduce beside it."""

import os
import resource
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import collective
from pipeline.collective import SHARED_MEMORY, BackendSum, SharedSum, open_sum
from tests.conftest import wait_for

SIZE, TURNS = 61_706, 50


def join(rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)


def add_up(rank: int, world_size: int, folder: Path) -> None:
    """Leaves the sums of many turns, and those of gloo."""
    torch.set_num_threads(1)
    join(rank, world_size, folder)
    sum_up = open_sum(SIZE, torch.device("cpu"), world_size, one_host=True)
    assert isinstance(sum_up, SharedSum)
    generator = torch.Generator().manual_seed(rank)
    ours, theirs = [], []
    for turn in range(TURNS):
        mine = torch.randn(SIZE, generator=generator)
        if turn % 10 == rank:
            time.sleep(0.05)  # now one is late, now another
        ours.append(mine.clone())
        word = sum_up(ours[-1], torch.tensor(float(rank + turn)))
        assert word == world_size * turn + sum(range(world_size))
        if turn % 10 == 0:
            theirs.append(mine)
            dist.all_reduce(theirs[-1])
    torch.testing.assert_close(torch.stack(ours[::10]), torch.stack(theirs), rtol=1e-5, atol=1e-5)
    (folder / f"{rank}.bytes").write_bytes(torch.stack(ours).numpy().tobytes())
    dist.barrier()
    dist.destroy_process_group()
    if world_size == 3:
        stay_away(rank, world_size, folder)


def stay_away(rank: int, world_size: int, folder: Path) -> None:
    """The last rank leaves after three turns; the others say so."""
    join(rank, world_size, folder / "again")
    sum_up = SharedSum(10)
    for _ in range(3):
        sum_up(torch.ones(10), torch.zeros(()))
    if rank == world_size - 1:
        return
    sum_up.patience_s = 5
    with pytest.raises(RuntimeError, match=rf"rank {rank} waited 5 s for gradients of ranks \[{world_size - 1}\]"):
        sum_up(torch.ones(10), torch.zeros(()))
    (folder / f"{rank}.seen").touch()


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_sum_in_the_same_bytes_and_of_three_one_that_stays_away_is_named_in_bounded_time(
    tmp_path: Path, world_size: int
) -> None:
    before = set(SHARED_MEMORY.glob("lenet-*"))
    (tmp_path / "again").mkdir()
    mp.spawn(add_up, (world_size, tmp_path), nprocs=world_size)
    found = {path.read_bytes() for path in tmp_path.glob("*.bytes")}
    assert len(list(tmp_path.glob("*.bytes"))) == world_size
    assert [len(content) for content in found] == [TURNS * SIZE * 4]
    assert {path.name for path in tmp_path.glob("*.seen")} == ({"0.seen", "1.seen"} if world_size == 3 else set())
    # Nothing stays, however the processes may end; what other tests have there meanwhile is soon gone.
    wait_for(lambda: set(SHARED_MEMORY.glob("lenet-*")) <= before)


def add_up_by_backend(rank: int, world_size: int, folder: Path) -> None:
    """As on several hosts; and in two containers of one address, each with a folder of its own for shared memory."""
    join(rank, world_size, folder)
    own = folder / f"container-{rank}"
    own.mkdir()
    os.chdir(own)
    collective.SHARED_MEMORY = Path("/proc/self/cwd")
    for one_host in (False, True):
        sum_up = open_sum(10, torch.device("cpu"), world_size, one_host)
        assert isinstance(sum_up, BackendSum)
        for turn in range(3):
            tensor = torch.full((10,), float(rank))
            # One rank's NaN reaches all, as the word's sense wants it.
            word = sum_up(tensor, torch.tensor(float("nan") if turn == rank == 1 else 0.5))
            torch.testing.assert_close(tensor, torch.full((10,), float(sum(range(world_size)))))
            assert word.isnan() if turn == 1 else word == 0.5 * world_size
        # As where processors differ, all go on with what rank 0 has.
        weights = torch.full((10,), float(rank))
        sum_up.align(weights)
        assert weights.tolist() == [0.0] * 10
    # And where shared memory is full, which nobody may hear of by SIGBUS.
    collective.SHARED_MEMORY = folder
    before, limits = set(folder.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))
    assert isinstance(open_sum(SIZE, torch.device("cpu"), world_size, one_host=True), BackendSum)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(folder.iterdir()) <= before
    assert not list(own.iterdir())
    dist.destroy_process_group()  # its threads would outlive what they work on, and crash a process that ends
    (folder / f"{rank}.seen").touch()


def test_ranks_without_memory_in_common_add_up_by_torchs_backend(tmp_path: Path) -> None:
    mp.spawn(add_up_by_backend, (2, tmp_path), nprocs=2)
    assert {path.name for path in tmp_path.glob("*.seen")} == {"0.seen", "1.seen"}


def test_shared_memory_is_for_one_host_and_the_cpu() -> None:
    assert isinstance(open_sum(10, torch.device("cpu"), 2, one_host=False), BackendSum)
    assert isinstance(open_sum(10, torch.device("meta"), 2, one_host=True), BackendSum)


@pytest.mark.parametrize("one_host", [True, False])
def test_who_is_alone_keeps_what_is_there(one_host: bool) -> None:
    mine = torch.arange(3.0)
    assert open_sum(3, torch.device("cpu"), 1, one_host)(mine, torch.tensor(2.5)) == 2.5
    assert mine.tolist() == [0, 1, 2]
