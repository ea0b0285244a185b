"""How long a server and an engine take until they are ready, and how much memory they have had at most by then.

It does not know what the time goes into (`python -X importtime` tells a part).
Read first: every row is a fresh process, with everything that it reads in the system's cache. `serve_s` are the seconds
on the wall from the start of `greenroom serve` until it says that it takes requests, the median of some starts, and
`serve_mb` its peak until then. The other figures are those of an engine alone, which goes on to answer: after the
imports, when it is ready, after its first answer, and after sixteen answers at once; in seconds on the wall and, since
others may use the machine, on the process's own clock. Memory is the peak of the resident set (VmHWM) so far.

    python benchmarks/startup.py --repertoire build/demo/repertoire
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import get_args

from peak_memory import peak_mb

from runtime.kernels.step_kinds import WeightKind

BATCH, NEW_TOKENS, STARTS = 16, 32, 3


def main() -> None:
    """Measure every kind of weights, each in a process of its own, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repertoire", type=Path, required=True)
    parser.add_argument("--dtype", choices=get_args(WeightKind), help="measure this one here, and print its row")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=get_args(WeightKind), help="of weights")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "startup.json")
    options = parser.parse_args()
    if options.dtype:
        print(json.dumps(measure(options.repertoire, options.dtype)))
        return
    rows = []
    for dtype in options.kinds:
        command = [sys.executable, __file__, "--repertoire", str(options.repertoire), "--dtype", dtype]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(serve(options.repertoire, dtype) | json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} at the end"
    results = {"machine": machine, "command": "python " + " ".join(sys.argv), "rows": rows}
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.output}")


def serve(repertoire: Path, dtype: WeightKind) -> dict[str, object]:
    """Starts of a server, each until it takes requests."""
    command = [sys.executable, "-m", "greenroom.cli.main", "serve", "--repertoire", str(repertoire), "--port", "0"]
    seconds, peaks = [], []
    for _ in range(STARTS):
        start = time.perf_counter()
        with subprocess.Popen([*command, "--dtype", dtype], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            if not server.stdout.readline().startswith("serving on"):
                raise SystemExit("the server did not start; its words are above")
            seconds.append(time.perf_counter() - start)
            peaks.append(peak_mb(server.pid))
            server.terminate()
    return {"serve_s": round(statistics.median(seconds), 2), "serve_mb": round(statistics.median(peaks))}


def measure(repertoire: Path, dtype: WeightKind) -> dict[str, object]:
    """One engine of this process."""
    start = time.perf_counter()
    row: dict[str, object] = {"dtype": dtype}

    def note(stage: str) -> None:
        row[f"{stage}_s"] = round(time.perf_counter() - start, 2)
        row[f"{stage}_cpu_s"] = round(time.process_time(), 2)
        row[f"{stage}_mb"] = round(peak_mb())

    from greenroom.cli.build_engine import build_engine
    from greenroom.cli.serve_config import load_config
    from runtime.engine.engine import Engine
    from runtime.engine.request import Event, Failed, Finished, Request, SamplingParams

    note("import")
    flags = load_config(None, {"repertoire": repertoire, "dtype": dtype}).engine_flags()
    engine = build_engine(flags)
    engine.start()
    note("ready")

    def answer(engine: Engine, count: int) -> None:
        ended = [threading.Event() for _ in range(count)]
        for i, end in enumerate(ended):

            def sink(event: Event, end: threading.Event = end) -> None:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    end.set()

            text = f"Put this order into JSON: {i + 2} apples and three pears for room {i}. " * 4
            sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
            engine.submit(Request(request_id=f"{count}-{i}", text=text, sampling=sampling), sink)
        if not all(end.wait(300) for end in ended):
            raise SystemExit("a request did not end within 300 s")

    answer(engine, 1)
    note("first")
    answer(engine, BATCH)
    note("batch")
    engine.close()
    return row


if __name__ == "__main__":
    main()
