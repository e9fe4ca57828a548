"""What an OpenAI API serves, as far as the harness has to know it."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fusionroute.errors import Reason, Unavailable, invalid
from fusionroute.remote_errors import error_of_status

PROBE_SECONDS = 10.0
MAX_PROBE_BYTES = 2**20
USUAL_CONTEXT_TOKENS = 2048
"""Where a server does not say how long its context is."""


@dataclass(frozen=True, slots=True)
class Server:
    """Whom the harness asks.

    Attributes:
        url: without /v1.
        models: that it serves.
        max_context_tokens: of the first of them.
    """

    url: str
    models: tuple[str, ...]
    max_context_tokens: int

    @classmethod
    def found_at(cls, url: str, key: str = "", ca: Path | None = None) -> Server:
        """Asks for its models.

        Args:
            url: http(s)://HOST:PORT, with or without /v1.
            key: shown as a bearer's token; "" = none.
            ca: certificates that it may be signed by; None = the system's.

        Raises:
            InvalidRequest: the URL, or a server without a list of models.
            AccessDenied: it wants another key.
            Unavailable: it does not answer.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise invalid(
                "url", f"{parts.scheme}://{parts.hostname or ''}", "http(s)://HOST:PORT without a password"
            )
        url = url.rstrip("/").removesuffix("/v1")
        try:
            listed = _get(f"{url}/v1/models", key, ca)["data"]
            lengths = [model.get("max_model_len") for model in listed]
            return cls(
                url,
                tuple(str(model["id"]) for model in listed),
                int(str(lengths[0])) if lengths[0] else USUAL_CONTEXT_TOKENS,
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise invalid("url", url, "a server of OpenAI's API, with /v1/models") from None


def _get(url: str, key: str, ca: Path | None) -> dict[str, list[dict[str, object]]]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - checked
    trust = ssl.create_default_context(cafile=str(ca)) if ca is not None else None
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS, context=trust) as answer:  # noqa: S310 - checked
            found: dict[str, list[dict[str, object]]] = json.loads(answer.read(MAX_PROBE_BYTES))
            return found
    except urllib.error.HTTPError as error:
        with error:
            raise error_of_status(error.code, url, error.reason, error.headers) from None
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise Unavailable(Reason.REMOTE_UNAVAILABLE, f"{url} does not answer: {reason}") from None
