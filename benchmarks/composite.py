"""Writes the composite instructions that grouped routers are trained on: a ward's notes, by function, domain and style.

Read first: every intent is a task folder of its own, for its expert, and `composite` asks for two or three of them at
once; `composite/unseen.jsonl` has questions with pairs of intents that meet in no training row. All follows from the
seed.

    python benchmarks/composite.py --folder my-data
    greenroom train --repertoire my-repertoire --data my-data --task urgency --task onset ... --visible own
    greenroom train-router --repertoire my-repertoire --data my-data/composite --group function=urgency,onset ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training.composite_data import write_composite_data


def main() -> None:
    """Write `<folder>/<intent>/` and `<folder>/composite/`, each with train.jsonl and test.jsonl, and the unseen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--train-rows", type=int, default=480, help="per folder")
    parser.add_argument("--test-rows", type=int, default=120, help="per folder")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    write_composite_data(chosen.folder, num_train=chosen.train_rows, num_test=chosen.test_rows, seed=chosen.seed)


if __name__ == "__main__":
    main()
