"""A conversion that ends by SIGKILL at an operation: `python -m tests.reliability.child MODEL TOKENS BASE INDEX`."""

import sys
from pathlib import Path

from tests.reliability.disk import Watch, kill_at
from tests.reliability.scene import Scene

if __name__ == "__main__":
    model, tokens, base, index = sys.argv[1:]
    with Watch(Path(base), kill_at(int(index), torn=True)):
        Scene(Path(model), Path(tokens)).run(Path(base))
