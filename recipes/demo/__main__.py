"""python -m recipes.demo [--out DIR], from the root of the repository."""

import argparse
import sys
from pathlib import Path

from .demo import CommandFailed, run_demo


def main() -> int:
    parser = argparse.ArgumentParser(prog="recipes.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    try:
        run_demo(parser.parse_args().out)
    except CommandFailed as failed:
        return int(failed.args[0])
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
