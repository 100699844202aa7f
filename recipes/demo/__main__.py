"""python -m recipes.demo [--all] [--out DIR], from the root of the repository."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="recipes.demo", description=__doc__)
    parser.add_argument("--all", action="store_true", help="all 16 models instead of four")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: runs/demo, or runs/demo-all"
    )
    args = parser.parse_args()

    # Not in the workers that prepare text.
    from recipes.demo.demo import ALL_TWINS, TWINS, CommandFailed, run_demo

    out = args.out or Path("runs/demo-all" if args.all else "runs/demo")
    try:
        run_demo(out, twins=ALL_TWINS if args.all else TWINS)
    except CommandFailed as failed:
        return int(failed.args[0])
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
