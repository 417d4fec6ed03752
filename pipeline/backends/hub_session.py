"""The client of the Hugging Face Hub as this product uses it: each failure told at once and in one way, no token told ever.

huggingface_hub's own retries are off: they wait as long as a server tells them to, and its commits are not retried at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from pipeline.errors import UserError

TOKENS = "https://huggingface.co/settings/tokens"
GIVE_TOKEN = (
    f"set HF_TOKEN to a token with write access ({TOKENS}), or run `hf auth login`; "
    "in GitHub Actions a Trusted Publisher needs none: give the job `permissions: id-token: write`"
)
_LOOKS_SECRET = re.compile(r"\bhf_[A-Za-z0-9_]{6,}|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the Hub is waited for. `waits_s`: seconds before each further try, give or take a half."""

    waits_s: tuple[float, ...] = (1, 2, 4, 8, 15, 30)
    seen_waits_s: tuple[float, ...] = (0.5, 1, 2, 4, 8)  # until what was written is shown
    longest_rate_wait_s: float = 120.0  # a rate limit that ends sooner is waited for
    rate_waits: int = 3  # so often at most
    connect_s: float = 10.0
    answer_s: float = 120.0  # without a byte


class Refused(Exception):
    """The Hub's own no. `code`: its name for it; `wait_s`: when it may be asked again, where it says so."""

    def __init__(self, status: int, said: str, *, code: str = "", path: str = "", wait_s: float | None = None) -> None:
        super().__init__(f"HTTP {status}: {said}")
        self.status, self.said, self.code, self.path, self.wait_s = status, said, code, path, wait_s

    @property
    def is_missing_repository(self) -> bool:
        return self.code == "RepoNotFound" or (self.status == 404 and self.code not in ("RevisionNotFound", "EntryNotFound"))


class Lost(Exception):
    """No answer came, so that nobody knows what was done."""


class Garbled(Exception):
    """An answer that is not a Hub's, or not the one that must come."""


# --- tokens ----------------------------------------------------------------------------------------------------------


def is_keyless() -> bool:
    """Whether the token is to be had for the job's identity: asked for, or the one way there is."""
    if os.environ.get("HF_OIDC_RESOURCE"):
        return True
    by_github = os.environ.get("ACTIONS_ID_TOKEN_REQUEST_URL") and os.environ.get("ACTIONS_ID_TOKEN_REQUEST_TOKEN")
    return bool(by_github) and not os.environ.get("HF_TOKEN", "").strip()


def check_token(token: str | None) -> None:
    if not token:
        raise UserError("no token for the Hugging Face Hub", hint=GIVE_TOKEN)
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # the client would quote it in its complaint
        raise UserError("HF_TOKEN holds characters that no token has", hint=f"copy it anew: {TOKENS}")


class Secrets:
    """Every secret that was sent, to be taken out of what is said."""

    def __init__(self) -> None:
        names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
        self._known = {value.strip() for name in names if (value := os.environ.get(name, "")).strip()}

    def sent_in(self, request: httpx2.Request) -> None:
        if secret := request.headers.get("authorization", "").partition(" ")[2].strip():
            self._known.add(secret)
        if request.url.path == "/oauth/token":
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._known.add(str(json.loads(request.content)["subject_token"]))

    def hidden(self, text: str) -> str:
        for secret in sorted(self._known, key=len, reverse=True):
            text = text.replace(secret, "***")
        return _LOOKS_SECRET.sub("***", text)


@contextlib.contextmanager
def _for_one_repository(resource: str | None) -> Iterator[None]:
    """A keyless token is for one repository, and the client looks for its name in the environment."""
    earlier = os.environ.get("HF_OIDC_RESOURCE")
    if resource is not None:
        os.environ["HF_OIDC_RESOURCE"] = resource
    try:
        yield
    finally:
        if resource is not None and earlier is None:
            del os.environ["HF_OIDC_RESOURCE"]
        elif earlier is not None:
            os.environ["HF_OIDC_RESOURCE"] = earlier


# --- the client ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def session(secrets: Secrets, patience: Patience, keyless_for: str | None) -> Iterator[None]:
    """Within it huggingface_hub works as said above. `keyless_for`: the repository that a token is to be had for by the job's identity."""
    with _for_one_repository(keyless_for), _quiet():
        set_client_factory(lambda: _Client(secrets, patience))
        try:
            yield
        finally:
            set_client_factory(default_client_factory)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The client without telemetry, bars and warnings (what matters of them is an error here), and with one way to upload."""
    earlier = constants.HF_HUB_DISABLE_XET, constants.HF_HUB_DISABLE_TELEMETRY
    bars = not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_TELEMETRY = True  # not by the environment: that is read once
        disable_progress_bars()
        try:
            yield
        finally:
            constants.HF_HUB_DISABLE_XET, constants.HF_HUB_DISABLE_TELEMETRY = earlier
            if bars:
                enable_progress_bars()


class _Client(httpx2.Client):
    """Tells every failure at once and in one way; huggingface_hub would retry some itself and word others by halves."""

    def __init__(self, secrets: Secrets, patience: Patience) -> None:
        super().__init__(follow_redirects=True, timeout=httpx2.Timeout(patience.answer_s, connect=patience.connect_s))
        self._sent = secrets

    def send(self, request: httpx2.Request, **settings: Any) -> httpx2.Response:
        self._sent.sent_in(request)
        request.extensions = {**request.extensions, "timeout": self.timeout.as_dict()}  # some calls of huggingface_hub have none
        path = request.url.path
        try:
            response = super().send(request, **settings)
            if response.status_code >= 400:
                response.read()
        except httpx2.TimeoutException:
            raise Lost(f"{request.method} {path} took too long") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise Lost(self._sent.hidden(f"{request.method} {path}: {error or type(error).__name__}")) from None
        if response.status_code >= 400:
            said = self._sent.hidden(_said(response)) or "no reason given"
            raise Refused(
                response.status_code, said, code=response.headers.get("X-Error-Code", ""), path=path, wait_s=_wait(response.headers)
            )
        if "html" in response.headers.get("Content-Type", "").lower():
            raise Garbled("an HTML page")
        return response


def _said(response: httpx2.Response) -> str:
    """The Hub's words: `error`, with `error_description` of OAuth, or `errors`; else the header, or what there is of text."""
    words: list[Any] = []
    try:
        told = response.json()
    except ValueError:
        if "html" not in response.headers.get("Content-Type", "").lower():
            words.append(response.text)
    else:
        told = told if isinstance(told, dict) else {}
        listed = told.get("errors")
        words += [told.get(key) for key in ("error", "error_description", "message")]
        words += [error.get("message") for error in listed if isinstance(error, dict)] if isinstance(listed, list) else []
    words.append(response.headers.get("X-Error-Message", ""))
    lines = dict.fromkeys(" ".join(str(word).split()) for word in words if word)
    return "; ".join(lines)[:1000]


def _wait(headers: Mapping[str, str]) -> float | None:
    """Seconds until the Hub may be asked again: of `RateLimit` where nothing remains, else of `Retry-After`."""
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})", headers.get("RateLimit", ""))
    if limit:
        return float(limit[1])
    after = headers.get("Retry-After", "").strip()
    return float(after) if re.fullmatch(r"\d{1,9}", after) else None
