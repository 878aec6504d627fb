"""What the table of a sweep says, by pandas. `python examples/read_table.py OUT/results.parquet`."""

import sys

import pandas as pd


def main(path: str) -> pd.DataFrame:
    """Mean and spread over seeds of each variant at each target, best KL divergence first."""
    cells = pd.read_parquet(path)
    done = cells[cells.status == "ok"].assign(
        megabytes=lambda x: x["size"] / 1e6, cpu_minutes=lambda x: x.cpu_seconds_quantize / 60
    )
    figures = done.groupby(["bits", "variant"]).agg(
        bpw=("bpw", "mean"),
        megabytes=("megabytes", "mean"),
        perplexity=("perplexity", "mean"),
        kl=("kl_divergence", "mean"),
        least=("kl_divergence", "min"),
        greatest=("kl_divergence", "max"),
        cpu_minutes=("cpu_minutes", "mean"),
    )
    return figures.reset_index().sort_values(["bits", "kl"])


if __name__ == "__main__":
    print(main(sys.argv[1]).to_string(index=False, float_format="{:.4f}".format))
