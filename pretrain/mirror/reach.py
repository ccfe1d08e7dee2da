"""Whether a server is there, within seconds. W&B's own client asks for minutes."""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from queue import Empty, SimpleQueue

SECONDS = 3.0


def answers(url: str, *, seconds: float = SECONDS) -> bool:
    """Whether anything answers HTTP at an address; what it says is for W&B's client to judge.

    Args:
        url: http or https; proxies of the environment are used.
        seconds: how long it may take, the look-up of the name included.
    """
    answer: SimpleQueue[bool] = SimpleQueue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            answer.put(True)
        except (OSError, HTTPException) as error:
            # A certificate that Python does not know may be one that W&B's client does.
            answer.put(isinstance(getattr(error, "reason", None), ssl.SSLError))
        else:
            answer.put(True)

    # A thread, because looking up a name has no timeout of its own.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=seconds)
    except Empty:
        return False
