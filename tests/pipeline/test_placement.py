"""Proves that workers are placed only where they fit, and that what does not fit is refused."""

import re
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.placement import ClusterConfig, auto_workers, decide_gpu, local_resources, placeable

Node = dict[str, float]
NODES = st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 64)}, optional={"GPU": st.integers(0, 8)}), max_size=5)


@example(nodes=[{"CPU": 7}], hundredths=7, gpus=0)  # 7 / 0.07 is less than 100 in floating point
@given(nodes=NODES, hundredths=st.integers(1, 800), gpus=st.integers(0, 2))
def test_a_worker_never_spans_nodes(nodes: list[Node], hundredths: int, gpus: int) -> None:
    cpus = Fraction(hundredths, 100)
    by_hand = 0
    for node in nodes:
        cpus_left, gpus_left = Fraction(node["CPU"]), node.get("GPU", 0)
        while cpus_left >= cpus and gpus_left >= gpus:
            cpus_left, gpus_left, by_hand = cpus_left - cpus, gpus_left - gpus, by_hand + 1
    assert placeable(nodes, hundredths / 100, gpus) == by_hand


@pytest.mark.parametrize(
    ("nodes", "workers", "fits"),
    [
        ([{"CPU": 2}], 2, True),
        ([{"CPU": 2}], 3, False),
        ([{"CPU": 1}, {"CPU": 1}], 2, True),
        ([], 1, False),
        ([{"memory": 1e9}], 1, False),
    ],
)
def test_workers_run_where_there_is_room(nodes: list[Node], workers: int, fits: bool) -> None:
    config = ClusterConfig(workers=workers)
    if fits:
        assert decide_gpu(config, nodes) is False
    else:
        with pytest.raises(ConfigError, match=f"^workers={workers}: Ray has room for"):
            decide_gpu(config, nodes)


def test_small_nodes_do_not_add_up_to_a_large_one() -> None:
    with pytest.raises(ConfigError, match=r"^workers=1: Ray has room for 0 on 3 CPUs with cpus_per_worker=2; ask for"):
        decide_gpu(ClusterConfig(workers=1, cpus_per_worker=2), [{"CPU": 1}, {"CPU": 1}, {"CPU": 1}])


@pytest.mark.parametrize(
    ("gpu", "gpus", "given"),
    [("auto", 2, True), ("auto", 1, False), ("auto", 0, False), ("no", 2, False), ("yes", 2, True)],
)
def test_gpus_are_given_to_every_worker_or_to_none(gpu: str, gpus: int, given: bool) -> None:
    config = ClusterConfig.model_validate({"workers": 2, "gpu": gpu})
    assert decide_gpu(config, [{"CPU": 4, "GPU": gpus}]) is given


@pytest.mark.parametrize(
    ("cpus", "gpus", "per_worker", "gpu", "workers"),
    [
        (8, 0, 1, True, 2),
        (8, 1, 1, True, 1),
        (8, 4, 1, True, 4),
        (8, 4, 1, False, 2),
        (2, 4, 1, True, 2),
        (1, 0, 1, True, 1),
        (3, 0, 2, True, 1),
        (1, 0, 2, True, 1),  # which does not fit, and is refused
    ],
)
def test_how_many_workers_auto_is(cpus: int, gpus: int, per_worker: float, gpu: bool, workers: int) -> None:
    assert auto_workers({"CPU": cpus, "GPU": gpus}, per_worker, gpu) == workers


def test_auto_goes_by_this_machine_where_ray_is_its_own_alone() -> None:
    assert ClusterConfig().wanted == auto_workers(local_resources(), 1, True)
    assert ClusterConfig(ray_address="auto").world_size == ClusterConfig(ray_address="http://h:8265").wanted == 2


@pytest.mark.parametrize(
    ("gpus", "remedy"),
    [(0, "use gpu=no, or see that PyTorch and its driver find one"), (1, "use gpu=no or fewer workers")],
)
def test_gpus_that_are_not_there_are_refused(gpus: int, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"^gpu='yes': 2 workers need a GPU each and Ray has {gpus}; {remedy}$"):
        decide_gpu(ClusterConfig(workers=2, gpu="yes"), [{"CPU": 8, "GPU": gpus}])


def test_when_cpus_are_short_the_gpus_are_not_blamed() -> None:
    with pytest.raises(ConfigError, match="^workers=2: Ray has room for 1 on 1 CPUs"):
        decide_gpu(ClusterConfig(workers=2, gpu="yes"), [{"CPU": 1, "GPU": 2}])


def test_this_machine_has_processors() -> None:
    assert local_resources()["CPU"] >= 1
    assert local_resources()["GPU"] >= 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("workers", 0), ("workers", 10_001), ("cpus_per_worker", 0), ("cpus_per_worker", 257), ("gpu", "maybe"), ("x", 1)],
)
def test_values_out_of_bounds_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=re.escape(field)):
        ClusterConfig.model_validate({field: value})
