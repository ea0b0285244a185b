"""The page at `/`: one file, sent with a policy that lets it load nothing from anywhere else.

It knows nothing of what the page shows.
Read first: the policy names the page's own script and style by their digests, so nothing injected would run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import HTMLResponse

FILE = Path(__file__).with_name("page.html")


def page_response() -> HTMLResponse:
    """The page with its policy."""
    text = FILE.read_text(encoding="utf-8")
    return HTMLResponse(
        text,
        headers={
            "content-security-policy": policy(text),
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-cache",
        },
    )


def policy(text: str) -> str:
    """The content security policy of a page with one inline script and one inline style."""
    sources = {name: _digest(text, name) for name in ("script", "style")}
    return (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; script-src '{sources['script']}'; style-src '{sources['style']}'"
    )


def _digest(text: str, name: str) -> str:
    (content,) = re.findall(rf"<{name}>(.*?)</{name}>", text, flags=re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
