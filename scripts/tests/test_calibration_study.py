"""The table of the calibration study, from figures made by hand."""

import math

from scripts.studies import calibration as study


def test_differences_are_paired_by_row() -> None:
    easy, hard = math.log(10), math.log(40)
    records = [
        {"source": None, "nll": [easy, hard], "kl": [0.0, 0.0]},
        {"source": "a", "nll": [easy + math.log(1.1), hard + math.log(1.1)], "kl": [0.1, 0.3]},
        {"source": "b", "nll": [easy + math.log(1.1 * 1.02), hard + math.log(1.1 * 1.04)], "kl": [0.2, 0.2]},
    ]
    *_, full, first, second = study.markdown(records).splitlines()
    assert full == "| (full precision) | 20.000 | | | | |"
    assert first == "| `a` | 22.000 | +10.00 % |  | 0.2000 |  |"
    # 2 % and 4 % more on rows of very different difficulty: 3 % with a standard error of 1.
    # The divergence doubles in one row and loses a third in the other.
    mixed = f"{20 * 1.1 * math.sqrt(1.02 * 1.04):.3f}"
    assert second == f"| `b` | {mixed} | +13.29 % | +3.00 % ± 1.00 | 0.2000 | +33.33 % ± 66.67 |"
