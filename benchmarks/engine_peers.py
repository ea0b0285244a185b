"""How other engines are run beside ours by benchmarks/engine.py: one process per round, a row per workload.

It does not know our engine.
Read first: a folder of peers holds one script per engine that takes `--workload`, `--repeats`, `--dtype`, `--threads`
and `--no-cold` and prints one JSON object per workload (`w, tps, ttft, tpot, rss_peak_mb`); `PEERS_ROOT` names the
folder of their environments.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SINGLE = ("W1", "W2", "W3", "W4")
BASE = ("W5b1", "W5b8", "W5b16")


@dataclass(frozen=True)
class Peer:
    """One system in one setting.

    Args:
        system: its name in the results.
        dtype: what it computes in, as its script takes it.
        weight_bits: of the base's weights.
        command: the script and its options, relative to the folder of peers; `{root}` is that of the environments.
        workloads: what it can run.
    """

    system: str
    dtype: str
    weight_bits: int
    command: tuple[str, ...]
    workloads: tuple[str, ...]


PEERS = (
    Peer("vllm-cpu", "bf16", 16, ("run_b_vllm.sh",), SINGLE),
    Peer("vllm-cpu", "bf16", 16, ("run_b_vllm.sh", "--nolora"), BASE),
    Peer("llama.cpp", "q8_0", 8, ("{root}/a/bin/python", "peer_c_llamacpp.py"), SINGLE),
    Peer("llama.cpp", "q8_0", 8, ("{root}/a/bin/python", "peer_c_llamacpp.py"), BASE),
    Peer("llama.cpp", "q4_0", 4, ("{root}/a/bin/python", "peer_c_llamacpp.py"), SINGLE),
    Peer("llama.cpp", "q4_0", 4, ("{root}/a/bin/python", "peer_c_llamacpp.py"), BASE),
    Peer("openvino-genai", "int8", 8, ("{root}/e/bin/python", "peer_e_openvino.py"), SINGLE),
    Peer("openvino-genai", "int8", 8, ("{root}/e/bin/python", "peer_e_openvino.py"), BASE),
    Peer("onnxruntime-genai", "int4", 4, ("{root}/d/bin/python", "peer_d_ortgenai.py"), SINGLE),
    Peer("onnxruntime-genai", "int4", 4, ("{root}/d/bin/python", "peer_d_ortgenai.py"), BASE),
    Peer("peft", "bf16", 16, ("{root}/a/bin/python", "peer_a_peft.py", "--mode", "mixed"), ("W3", "W4")),
    Peer("peft-arrow", "bf16", 16, ("{root}/a/bin/python", "peer_g_mixture.py", "--mode", "arrow"), ("M8",)),
)
"""The loaders of base-only rows are apart where switching adapters on makes an engine slower."""

SAME_AS = {"M8": "W6"}  # eight sequences, each routed over eight experts


def run_peer(peer: Peer, folder: Path, root: Path, *, workloads: tuple[str, ...], threads: int) -> Iterator[dict]:  # type: ignore[type-arg]
    """One round of a peer: its rows, in our words; nothing, and a line on stderr, where it fails."""
    wanted = [name for name in peer.workloads if SAME_AS.get(name, name) in workloads]
    if not wanted:
        return
    words = [word.format(root=root) for word in peer.command]
    first = words[0] if words[0].startswith("/") else str(folder / words[0])
    command = [first, *words[1:], "--workload", ",".join(wanted), "--repeats", "1", "--dtype", peer.dtype]
    command += ["--threads", str(threads), "--no-cold"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=1200)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{peer.system}: {error}", file=sys.stderr)
        return
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        if "tps" not in row:
            print(f"{peer.system} {row.get('w')}: {row.get('error', 'no figures')}", file=sys.stderr)
            continue
        yield {
            "workload": SAME_AS.get(row["w"], row["w"]),
            "tokens_per_s": row["tps"],
            "ttft_s": row["ttft"],
            "tpot_s": row["tpot"],
            "peak_rss_mb": row["rss_peak_mb"],
        }
    if not rows:
        print(f"{peer.system}: {done.stderr[-2000:]}", file=sys.stderr)
