"""The routing report as plain values, for protocols that carry it as JSON.

It knows nothing of those protocols.
Read first: names and meanings are those of `greenroom.v1.Routing`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.engine.request import Finished, Located


def routing_report(located: Located) -> dict[str, Any]:
    """Who answers, why, and with which experts; everything in it is a JSON value."""
    report = asdict(located)
    report["experts"] = [
        {("load_seconds" if name == "load_s" else name): value for name, value in expert.items()}
        for expert in report["experts"]
    ]
    return report


def layers_report(finished: Finished) -> list[dict[str, Any]]:
    """How much each expert and group of each layer had to say, where the request asked for it."""
    return [
        {"layer": weights.layer, "experts": dict(weights.experts), "groups": dict(weights.groups)}
        for weights in finished.explanation
    ]
