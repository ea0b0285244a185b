"""Methods of learning tasks in sequence, compared: the figures of benchmarks/results/continual.json.

It is `greenroom evaluate` with a place for the results; see its options.
Read first: it is resumable. What is finished lies in `--work`.

    python benchmarks/continual.py --data FOLDER --tasks a,b,c --lookalike a,b --seeds 0,1,2
"""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from greenroom.cli.evaluate import evaluate

RESULTS = Path(__file__).parent / "results" / "continual.json"
WORK = Path("build") / "continual"


def main() -> None:
    """Run `evaluate`; a later option of the same name wins over these."""
    app = typer.Typer(add_completion=False)
    app.command()(evaluate)
    app(["--output", str(RESULTS), "--work", str(WORK), *sys.argv[1:]], prog_name="python benchmarks/continual.py")


if __name__ == "__main__":
    main()
