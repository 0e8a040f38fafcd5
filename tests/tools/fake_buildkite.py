"""A local HTTP server that plays the part of Buildkite's REST API that utils/monitor_build.py uses.

What it does was taken from Buildkite's documentation: lists with a Link header, 404 with a message, 429 with its
RateLimit headers, artifacts as a redirect to another origin, logs as text.
"""

import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

TOKEN = "bkua_0123456789abcdef"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIPELINE = "/v2/organizations/clawpot/pipelines/clawpot"

#: Status, headers, body; a body that is shorter than the Content-Length in the headers breaks off.
Answer = tuple[int, dict[str, str], bytes]


class Web(http.server.ThreadingHTTPServer):
    """One origin. Every request is noted with its headers."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str, dict[str, str]], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers))
        status, sent, body = self.server.answer(self.path, headers)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **sent}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def script(number: int, state: str = "running", **more: Any) -> dict[str, Any]:
    return {
        "id": f"0000000{number}-aaaa-bbbb-cccc-0123456789ab",
        "type": "script",
        "name": f"step {number}",
        "state": state,
        "exit_status": None,
        "soft_failed": False,
    } | more


def artifact(number: int, job: dict[str, Any], path: str, size: int, sha1: str) -> dict[str, Any]:
    return {
        "id": f"f000000{number}-aaaa-bbbb-cccc-0123456789ab",
        "job_id": job["id"],
        "state": "finished",
        "path": path,
        "file_size": size,
        "sha1sum": sha1,
        # What these say is not to be followed.
        "url": "http://elsewhere.invalid/",
        "download_url": "http://elsewhere.invalid/",
    }


class Buildkite:
    """`looks` are the states of the build, one for each time it is asked for; the last one stays."""

    def __init__(self) -> None:
        self.looks: list[dict[str, Any]] = []
        self.builds: list[dict[str, Any]] | None = None
        self.logs: dict[str, bytes] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        #: Given once each, in order, before anything else is.
        self.first: list[Answer] = []
        #: By a pattern on the path, also once each.
        self.instead: list[tuple[str, Answer]] = []
        self.page_size = 100
        self.store = Web(self.from_store)
        self.api = Web(self.from_api)

    def close(self) -> None:
        for web in (self.store, self.api):
            web.shutdown()
            web.server_close()

    def look(self, state: str, *jobs: dict[str, Any], **more: Any) -> None:
        web_url = "https://buildkite.com/clawpot/clawpot/builds/7"
        self.looks.append({"number": 7, "state": state, "web_url": web_url, "jobs": list(jobs)} | more)

    def from_store(self, path: str, headers: dict[str, str]) -> Answer:
        # S3 refuses a request that is signed in its query and bears an Authorization header too.
        if "authorization" in headers:
            return 400, {}, b"only one auth mechanism allowed"
        name = urllib.parse.urlsplit(path).path.rsplit("/", 1)[1]
        return 200, {}, self.files[name]

    def from_api(self, path: str, headers: dict[str, str]) -> Answer:
        if self.first:
            return self.first.pop(0)
        for entry in self.instead:
            if re.search(entry[0], path):
                self.instead.remove(entry)
                return entry[1]
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return said(401, {"message": "Authentication required"})
        parts = urllib.parse.urlsplit(path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        below = parts.path.removeprefix(PIPELINE)
        if below == parts.path:
            return said(404, {"message": "No organization found"})
        if below == "/builds":
            builds = self.builds if self.builds is not None else self.looks[:1]
            return self.page(parts.path, query, builds if query.get("commit") == COMMIT else [])
        if below == "/builds/7":
            return said(200, self.looks.pop(0) if len(self.looks) > 1 else self.looks[0])
        if below == "/builds/7/artifacts":
            return self.page(parts.path, query, self.artifacts)
        if found := re.fullmatch(r"/builds/7/jobs/([^/]+)/log\.txt", below):
            if found[1] in self.logs:
                return 200, {"Content-Type": "text/plain"}, self.logs[found[1]]
            return said(404, {"message": "No log found"})
        if found := re.fullmatch(r"/builds/7/jobs/[^/]+/artifacts/([^/]+)/download", below):
            target = f"{self.store.url}/bucket/{found[1]}?X-Signature=secret"
            return 302, {"Location": target}, json.dumps({"url": target}).encode()
        return said(404, {"message": "Not found"})

    def page(self, path: str, query: dict[str, str], items: list[dict[str, Any]]) -> Answer:
        number = int(query.get("page", "1"))
        start = (number - 1) * self.page_size
        headers = {}
        if start + self.page_size < len(items):
            following = urllib.parse.urlencode({**query, "page": str(number + 1)})
            headers["Link"] = f'<{self.api.url}{path}?{following}>; rel="next", <{self.api.url}{path}?page=9>; rel="last"'
        status, _, body = said(200, items[start : start + self.page_size])
        return status, headers, body


def said(status: int, what: Any, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(what).encode()
