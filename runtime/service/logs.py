"""Logs as JSON lines, each with the request that it is about.

It knows nothing of what is logged.
Read first: one object per line; `fields` of a record's `extra` become keys of their own.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from runtime.service.call import CALL


class JsonLines(logging.Formatter):
    """Formats records as JSON objects: time, level, logger, message, request_id, trace_id, fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        call = CALL.get(None)
        if call is not None:
            line |= {"request_id": call.request_id, "trace_id": call.trace_id}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
