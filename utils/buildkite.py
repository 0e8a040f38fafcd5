"""A small client of Buildkite's REST API (version 2), for utils/monitor_build.py.

It reads and never writes. The token goes to the API's own origin and to nothing else: redirects (artifacts lie behind a
pre-signed URL of some object store) are followed by hand, without it.
"""

import email.utils
import http.client
import json
import random
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

#: One read or connect on the network, seconds.
SOCKET_TIMEOUT = 30.0
#: How often one request is tried before the API counts as out of reach; with doubling waits about two minutes.
TRIES = 8
LONGEST_WAIT = 30.0
#: The API answers a download with one redirect; object stores may add one or two.
REDIRECTS = 5
#: Most that one page of JSON may be, bytes: 100 builds with all their jobs are a few MB.
PAGE_LIMIT = 64 << 20
#: Most pages of one list.
PAGES = 100
REDIRECT_CODES = (301, 302, 303, 307, 308)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ApiError(Exception):
    """What the API refused, or that it cannot be reached. The text says what to do next."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class TimeIsUp(Exception):
    """The deadline came, or would come before the API wants to be asked again."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib's own way of following hands the Authorization header on to whatever host it is sent to."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass
class Client:
    base: str
    token: str
    #: In time.monotonic()'s seconds; no request and no wait goes beyond it.
    deadline: float
    #: The first wait after a failure, seconds; it doubles.
    first_wait: float = 1.0
    opener: urllib.request.OpenerDirector = field(init=False)

    def __post_init__(self) -> None:
        self.base = self.base.rstrip("/")
        self.opener = urllib.request.build_opener(NoRedirect)
        parts = urllib.parse.urlsplit(self.base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ApiError(f"{self.base}: not an http or https URL")
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise ApiError(f"{self.base}: the token would go over the network unencrypted; use https")

    def list(self, path: str, **query: str) -> Iterator[dict[str, Any]]:
        """All items of a paginated list. The next page's address is the API's word, so its origin is checked."""
        url = f"{self.base}{path}?{urllib.parse.urlencode({'per_page': '100', **query})}"
        for _ in range(PAGES):
            items, following = self.ask(url, "application/json", lambda page: (read_json(page), next_page(page)))
            if not isinstance(items, list):
                raise ApiError(f"{bare(url)}: not a list")
            yield from (item for item in items if isinstance(item, dict))
            if not following:
                return
            url = urllib.parse.urljoin(url, following)
            if origin(url) != origin(self.base):
                raise ApiError(f"the list goes on at {bare(url)}, which is not the API; not asked")
        raise ApiError(f"{bare(url)}: more than {PAGES} pages")

    def get(self, path: str) -> dict[str, Any]:
        found = self.ask(f"{self.base}{path}", "application/json", read_json)
        if not isinstance(found, dict):
            raise ApiError(f"{self.base}{path}: not an object")
        return found

    def download(self, path: str, use: Callable[[http.client.HTTPResponse], T], accept: str = "*/*") -> T:
        """`use` is given the answer, and given it anew when the connection breaks while it reads."""
        return self.ask(f"{self.base}{path}", accept, use)

    def ask(self, url: str, accept: str, use: Callable[[http.client.HTTPResponse], T]) -> T:
        """One GET, tried again where that can help, followed to where it leads."""
        wait = self.first_wait
        for attempt in range(1, TRIES + 1):
            try:
                with self.follow(url, accept) as response:
                    return use(response)
            except urllib.error.HTTPError as error:
                error.close()
                asked = retry_after(error)
                if error.code != 429 and error.code < 500:
                    raise refusal(error, url) from None
                why = f"HTTP {error.code}"
            except BrokenPipeError:
                # `use` found nobody who reads what it prints; what befalls a request is a URLError.
                raise
            except (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
                asked, why = None, str(getattr(error, "reason", None) or error or type(error).__name__)
            if attempt == TRIES:
                raise ApiError(f"{bare(url)}: {why}, {TRIES} times; try again later")
            # Somebody else's monitor was refused at the same moment.
            self.sleep(asked if asked is not None else wait * random.uniform(0.75, 1.25), why)
            wait = min(wait * 2, LONGEST_WAIT)
        raise AssertionError("unreachable")

    def follow(self, url: str, accept: str) -> http.client.HTTPResponse:
        for _ in range(REDIRECTS + 1):
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeIsUp
            request = urllib.request.Request(url, headers={"User-Agent": "clawpot-monitor-build"})
            if origin(url) == origin(self.base):
                request.add_header("Authorization", f"Bearer {self.token}")
                request.add_header("Accept", accept)
            try:
                return self.opener.open(request, timeout=min(SOCKET_TIMEOUT, max(left, 0.1)))
            except urllib.error.HTTPError as error:
                target = error.headers.get("Location")
                if error.code not in REDIRECT_CODES or not target:
                    raise
                error.close()
            following = urllib.parse.urljoin(url, target)
            if urllib.parse.urlsplit(following).scheme not in ("https", urllib.parse.urlsplit(url).scheme):
                raise ApiError(f"{bare(url)} leads to {bare(following)}, away from https; not followed")
            url = following
        raise ApiError(f"{bare(url)}: more than {REDIRECTS} redirects")

    def sleep(self, seconds: float, why: str = "") -> None:
        """Waits, or says at once that the wait would outlast the deadline."""
        if time.monotonic() + seconds >= self.deadline:
            raise TimeIsUp(f"{why}, to be asked again in {seconds:.0f} s" if why else "")
        time.sleep(seconds)


def origin(url: str) -> tuple[str, str, int]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)


def bare(url: str) -> str:
    """Without its query: that of a pre-signed URL is a secret."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"


def next_page(response: http.client.HTTPResponse) -> str | None:
    found = re.search(r'<([^>]*)>\s*;[^,]*\brel="?next"?', response.headers.get("Link", ""))
    return found[1] if found else None


def read_json(response: http.client.HTTPResponse) -> Any:
    body = response.read(PAGE_LIMIT + 1)
    if len(body) > PAGE_LIMIT:
        raise ApiError(f"{bare(response.url)}: more than {PAGE_LIMIT >> 20} MiB of JSON")
    if response.length:
        raise http.client.IncompleteRead(body, response.length)
    try:
        return json.loads(body)
    except ValueError as error:
        raise ApiError(f"{bare(response.url)}: not JSON ({error})") from None


def retry_after(error: urllib.error.HTTPError) -> float | None:
    """How long the API wants to be left alone, seconds: Retry-After, or the end of Buildkite's rate-limit window."""
    said = error.headers.get("Retry-After")
    if said and not said.strip().isdigit():
        try:
            return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
        except ValueError:
            said = None
    if not said and error.code == 429:
        # Of two limits the one that is used up; both are given each time.
        for scope in ("-User", ""):
            if error.headers.get(f"RateLimit{scope}-Remaining", "0").strip() == "0":
                said = said or error.headers.get(f"RateLimit{scope}-Reset")
    return float(said) if said and said.strip().isdigit() else None


def refusal(error: urllib.error.HTTPError, url: str) -> ApiError:
    hints = {
        401: "the token is not valid: set BUILDKITE_API_TOKEN to one that is",
        403: "the token may not: it needs the scopes read_builds, read_build_logs and read_artifacts",
        404: "no such thing, or the token may not see it: look at --org and --pipeline",
    }
    return ApiError(f"{bare(url)}: HTTP {error.code}; {hints.get(error.code, 'not to be mended by asking again')}", error.code)
