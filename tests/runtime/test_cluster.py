"""Which cluster is asked for, and how its machines are shared out; tests/test_ray.py starts a real one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saae_runtime import cluster
from saae_runtime.errors import ConfigError
from saae_runtime.ray_options import asked_cluster


@pytest.mark.parametrize(
    ("ray", "address", "variable", "expected"),
    [
        (False, None, None, None),
        (False, None, "10.0.0.1:6379", None),  # set for all programs of a cluster's machine: asks for nothing
        (True, None, None, "auto"),
        (True, None, "10.0.0.1:6379", "10.0.0.1:6379"),
        (True, "local", "10.0.0.1:6379", "local"),
        (False, "10.0.0.2:6379", None, "10.0.0.2:6379"),
    ],
)
def test_which_cluster_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, ray: bool, address: str | None, variable: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert asked_cluster(ray, address) == expected


def cluster_of(monkeypatch: pytest.MonkeyPatch, *machines: tuple[int, int]) -> None:
    """Machines of so many (CPUs, GPUs), as Ray lists them: what there is none of is not named."""
    named = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in machines]
    nodes = [{"Alive": True, "Resources": {name: n for name, n in each.items() if n}} for each in named]
    nodes.append({"Alive": False, "Resources": {"CPU": 1000.0, "GPU": 8.0}})
    monkeypatch.setattr(cluster, "library", lambda: SimpleNamespace(nodes=lambda: nodes))


def test_one_for_each_machine_or_gpu_with_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, (16, 0), (16, 0), (0, 0))  # the last one only leads
    assert cluster.shares(None, 0) == (2, 16)
    assert cluster.shares(8, 0) == (8, 4)
    assert cluster.shares(None, 0, cpus=3) == (10, 3)
    cluster_of(monkeypatch, (16, 2), (16, 1))
    assert cluster.shares(None, 1) == (3, 8)


def test_a_worker_that_fits_on_no_machine_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, (64, 0), (4, 0))
    assert cluster.shares(2, 0) == (2, 32)  # 34 each would leave the second without a place
    cluster_of(monkeypatch, (2, 0), (2, 0))
    with pytest.raises(ConfigError, match="no room for 1 processes of 4 CPUs"):
        cluster.shares(None, 0, cpus=4)
    with pytest.raises(ConfigError, match="0 GPUs"):
        cluster.shares(None, 1)
    with pytest.raises(ConfigError, match="5 processes"):
        cluster.shares(5, 0)


@given(
    machines=st.lists(st.tuples(st.integers(1, 64), st.integers(0, 4)), min_size=1, max_size=5),
    workers=st.none() | st.integers(1, 40),
    gpus=st.integers(0, 1),
)
def test_all_workers_have_a_place_and_no_larger_share_would_do(
    machines: list[tuple[int, int]], workers: int | None, gpus: int
) -> None:
    def placed(each: int) -> int:
        """Place one after the other until none fits any more."""
        left, count = [list(machine) for machine in machines], 0
        while fits := [machine for machine in left if machine[0] >= each and machine[1] >= gpus]:
            fits[0][0] -= each
            fits[0][1] -= gpus
            count += 1
        return count

    with pytest.MonkeyPatch.context() as patch:
        cluster_of(patch, *machines)
        try:
            found, cpus = cluster.shares(workers, gpus)
        except ConfigError:
            assert placed(1) < (workers or max(1, sum(machine[1] for machine in machines)))
            return
    assert found == (workers or found)
    assert placed(cpus) >= found > placed(cpus + 1)
