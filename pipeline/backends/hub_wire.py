"""Questions to the Hugging Face Hub, asked with patience: which failures pass, which are final, and what is said of each."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, OIDCError

from pipeline.backends.hub_session import TOKENS, Garbled, Lost, Patience, Refused, Secrets, check_token, is_keyless, session
from pipeline.errors import BackendError, UserError

AGAIN = "run again: what is there already is not sent twice"
CREATE = "create it on the Hub, or have it created"
PULL_REQUESTS_ONLY = "where nobody else is at work, the token may open pull requests only: give it write access"
SHOWN_WAIT_S = 4.0  # longer waits are told

logger = logging.getLogger(__name__)
_Out = TypeVar("_Out")
_PASSING = frozenset({408, 409, 412, 425})  # beside 5xx and 429


def endpoint() -> str:
    return str(constants.ENDPOINT)


class Wire:
    """The connection for one repository. Within `open`, huggingface_hub works through it and `api` may be used.

    Args:
        resource: the repository as Trusted Publishers name it: "ns/name", "datasets/ns/name".
    """

    def __init__(self, resource: str, patience: Patience, sleep: Callable[[float], None], now: Callable[[], datetime]) -> None:
        self.resource, self.patience, self._sleep, self._now = resource, patience, sleep, now
        self.keyless = is_keyless()
        self._secrets = Secrets()
        self.api = HfApi(endpoint=endpoint(), token=True)

    @contextlib.contextmanager
    def open(self) -> Iterator[Wire]:
        """
        Raises:
            UserError: HF_HUB_OFFLINE is set, or there is no token.
        """
        if constants.is_offline_mode():
            raise UserError(
                "HF_HUB_OFFLINE is set, so nothing is published", hint="unset it (and TRANSFORMERS_OFFLINE), or set publish.enabled: false"
            )
        if not self.keyless:
            check_token(get_token())
        with session(self._secrets, self.patience, self.resource if self.keyless else None):
            yield self

    def call(self, work: Callable[[], _Out]) -> _Out:
        """What a call of huggingface_hub gives; what it raises is one of Refused, Lost, Garbled, or final."""
        try:
            return work()
        except RuntimeError as error:  # so the client wraps what fails in its threads
            cause = error.__cause__
            if isinstance(cause, Refused | Lost | Garbled):
                raise cause from None
            raise
        except OIDCError as error:
            raise self._keyless_refused(str(error)) from None
        except HFValidationError as error:
            raise UserError(f"{self.resource}: {error}", hint="choose another publish.namespace or project") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Garbled(self._secrets.hidden(f"an answer that can't be read ({type(error).__name__}: {error})")) from None

    def patiently(self, work: Callable[[], _Out]) -> _Out:
        """What `work` gives, done anew from its start as long as its failure may pass.

        Raises:
            BackendError
        """
        waits, limits = list(self.patience.waits_s), self.patience.rate_waits
        while True:
            try:
                return work()
            except (Refused, Lost, Garbled) as error:
                failure = error
            if isinstance(failure, Refused) and failure.status == 429:
                wait = failure.wait_s
                limits -= 1
                if wait is None or wait > self.patience.longest_rate_wait_s or limits < 0:
                    raise self._explained(failure)
                wait += 1  # rounded down by the Hub
            elif self._passes(failure) and waits:
                wait = waits.pop(0) * random.uniform(0.5, 1.5)  # two who met part
            else:
                raise self._explained(failure)
            logger.log(
                logging.WARNING if wait >= SHOWN_WAIT_S else logging.INFO,
                "%s: %s; again in %.0f s", self.resource, self._secrets.hidden(str(failure)), wait,
            )  # fmt: skip
            self._sleep(wait)

    def until_shown(self, look: Callable[[], _Out | None]) -> _Out | None:
        """What `look` gives as soon as it gives something: a write is not always seen at once."""
        for wait in (*self.patience.seen_waits_s, None):
            if (found := look()) is not None or wait is None:
                return found
            self._sleep(wait)
        raise AssertionError("the last wait is None")

    @staticmethod
    def _passes(failure: Exception) -> bool:
        if isinstance(failure, Refused):
            return failure.status in _PASSING or failure.status >= 500 or failure.code == "RevisionNotFound"  # not seen yet
        return True

    # --- what is said ---

    def _explained(self, failure: Refused | Lost | Garbled) -> BackendError:
        if isinstance(failure, Lost):
            return self.error(
                f"no answer from {endpoint()}: {failure}", f"check the network (and HF_ENDPOINT), look at status.huggingface.co; {AGAIN}"
            )
        if isinstance(failure, Garbled):
            return self.error(
                f"what answers at {endpoint()} is not the Hub, or a broken one: {failure}",
                f"check HF_ENDPOINT: a proxy may stand before it; {AGAIN}",
            )
        if failure.path == "/oauth/token" and failure.status < 500:
            return self._keyless_refused(str(failure))
        status = failure.status
        told = f"(HTTP {status}): {failure.said}"
        if status == 400:
            return self.error(f"the Hub finds a fault {told}", f"the card or a setting is wrong; change it, then {AGAIN}")
        if status in (401, 403):
            what = "does not accept the token" if status == 401 else "does not let the token do this"
            return self.error(f"the Hub {what} {told}", self._what_to_check())
        if status == 412:
            return self.error(f"the repository changes again and again while it is written to {told}", f"{AGAIN}; {PULL_REQUESTS_ONLY}")
        if status == 429:
            return self._rate_limited(failure)
        if failure.is_missing_repository:
            return self.error(f"no such repository, or one that the token may not see {told}", f"{CREATE}; {self._what_to_check()}")
        if status >= 500:
            return self.error(f"the Hub failed {told}", f"look at status.huggingface.co, then {AGAIN}")
        return self.error(f"the Hub refused {told}", f"see https://huggingface.co/docs/hub; then {AGAIN}")

    def _rate_limited(self, failure: Refused) -> BackendError:
        if failure.wait_s is None:
            allowed = "it allows 128 commits an hour and 1,000 requests in 5 minutes"
            return self.error("the Hub takes no more requests for now (HTTP 429)", f"{allowed}; {AGAIN}")
        at = (self._now() + timedelta(seconds=failure.wait_s)).strftime("%H:%M:%S UTC")
        return self.error(
            f"the Hub takes no more requests for the next {failure.wait_s:.0f} s (HTTP 429)", f"come back after {at}; {AGAIN}"
        )

    def _keyless_refused(self, said: str) -> BackendError:
        return self.error(f"the Hub gives this job no token: {said}", self._what_to_check())

    def _what_to_check(self) -> str:
        if not self.keyless:
            return f"is HF_TOKEN valid, and does it have write access to {self.resource}? See {TOKENS}"
        workflow = os.environ.get("GITHUB_WORKFLOW_REF", "").partition("@")[0].rpartition("/")[2]
        claims = {
            "repository": os.environ.get("GITHUB_REPOSITORY"),
            "branch": os.environ.get("GITHUB_REF_NAME"),
            "workflow": workflow,
        }
        told = ", ".join(f"{name} {value or '(unknown here)'}" for name, value in claims.items())
        return (
            f"{endpoint()}/{self.resource} must exist first, and its settings name this job as a Trusted Publisher, "
            f"letter for letter: {told}; the job needs `permissions: id-token: write`"
        )

    def error(self, message: str, hint: str) -> BackendError:
        return BackendError(self._secrets.hidden(f"{self.resource}: {message}"), hint=self._secrets.hidden(hint))
