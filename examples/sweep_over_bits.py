"""Quality against size: one model over many targets. `python examples/sweep_over_bits.py MODEL OUT [BITS ...]`."""

import sys
from pathlib import Path

from exl2jax.lab import SweepPlan, run_sweep
from exl2jax.lab.page import sweep_page
from exl2jax.lab.plan import EvaluationPlan, VariantPlan
from exl2jax.report.page import write_page
from exl2jax.variants.recipe import PRESETS


def main(model: str, out: Path, targets: list[float]) -> None:
    """Run the sweep and write its table and page to `out`."""
    plan = SweepPlan(
        models=(model,),
        targets=tuple(targets),
        variants=(VariantPlan(name="fast", recipe=PRESETS["fast"]),),
        settings={"dataset_rows": 8, "length": 128, "measurement_rows": 4, "measurement_length": 128},
        evaluation=EvaluationPlan(rows=10, length=128),
    )
    for row in run_sweep(plan, out).rows:
        print(f"{row['bits']:4.2f} bits: {row.get('kl_divergence', float('nan')):.4f} nats, {row['status']}")
    write_page(sweep_page(out), out / "report.html")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [float(x) for x in sys.argv[3:]] or [2.5, 3.0, 3.5, 4.0, 5.0, 6.0])
