"""A sweep over a Ray cluster of two nodes, one of which is killed in the middle."""

import importlib.util
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from exl2jax.lab import SweepPlan, SweepResult, read_results, run_sweep
from exl2jax.lab.cluster import ray_runner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
FIGURES = ["cell", "status", "bpw", "size", "perplexity", "kl_divergence", "sha256_measurement", "sha256_calibration"]


def test_two_nodes_one_killed(plan: SweepPlan, sweep: SweepResult, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    asked = replace(plan, variants=plan.variants[1:])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed = cluster.add_node(num_cpus=1)
    killed: list[float] = []

    def kill() -> None:
        while not list(tmp_path.glob("cells/*/work")):
            time.sleep(0.1)
        cluster.remove_node(doomed, allow_graceful=False)
        killed.append(time.monotonic())

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = run_sweep(asked, tmp_path, runner=ray_runner(cluster.address))
    finally:
        killer.join(timeout=60)
        cluster.shutdown()
    assert killed and killed[0] < time.monotonic() and result.failed == 0
    wanted = read_results(sweep.table).slice(2).select(FIGURES)
    assert read_results(result.table).select(FIGURES).equals(wanted)
