"""What a server says of itself over HTTP: its health, and its metrics in Prometheus' text form."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Mapping

METRICS_BYTES = 4 * 1024 * 1024
"""Most of a page that is read."""
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
Sample = tuple[str, dict[str, str], float]


def samples(text: str) -> list[Sample]:
    """Name, labels and value of each line of a page of metrics; lines that are none are left out."""
    found = []
    for match in _SAMPLE.finditer(text):
        try:
            found.append((match[1], dict(_LABEL.findall(match[2] or "")), float(match[3])))
        except ValueError:
            continue
    return found


def fetch(
    url: str, api_key: str = "", timeout_s: float = 5.0, headers: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """The status and the text of a GET; status 0, and why, where nothing answers.

    Args:
        url: http:// or https://.
        api_key: sent as a bearer token, if not empty.
        timeout_s: to wait.
        headers: further ones.
    """
    if not _ADDRESS.match(url):
        return 0, f"{url} is no http:// or https:// address"
    own = {**(headers or {}), **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    try:
        request = urllib.request.Request(url, headers=own)  # noqa: S310
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
            return int(answer.status), answer.read(METRICS_BYTES).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read(METRICS_BYTES).decode(errors="replace")
    except (OSError, ValueError) as error:
        return 0, str(getattr(error, "reason", error))
    except Exception as error:  # http.client's BadStatusLine and its kin: something else than HTTP answers
        return 0, f"no HTTP answer: {type(error).__name__}: {error}"
