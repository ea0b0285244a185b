"""The frames in which a replica answers its entry: a kind byte and a message.

It knows nothing of either.
Read first: both sides import this, so the entry needs none of a replica's libraries.
"""

MESSAGE = b"M"
"""A response, serialised."""
ERROR = b"E"
"""A `google.rpc.Status`, serialised; the last frame."""
RESIDENT = "resident"
"""Among a replica's statistics: the tasks whose whole visible set is in its memory."""
