"""python -m recipes.demo [--out DIR], from the root of the repository."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="recipes.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    out = parser.parse_args().out

    from recipes.demo.demo import CommandFailed, run_demo  # not in the workers that prepare text

    try:
        run_demo(out)
    except CommandFailed as failed:
        return int(failed.args[0])
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
