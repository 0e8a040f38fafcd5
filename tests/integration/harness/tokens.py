"""A token service, where registries send their clients: who knows the password may do all, others may pull `public/…`.

python tokens.py PORT CERTIFICATE KEY      PEM files; the registry trusts whoever signed the certificate
"""

import base64
import http.server
import json
import ssl
import subprocess
import sys
import time
from urllib.parse import parse_qs, urlsplit

ISSUER = "test-issuer"
SERVICE = "test-registry"
PASSWORD = "Basic " + base64.b64encode(b"me:secret").decode()


def _part(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def token(certificate: str, key: str, access: list[dict[str, object]]) -> str:
    with open(certificate, encoding="ascii") as file:
        chain = base64.b64encode(ssl.PEM_cert_to_DER_cert(file.read())).decode()
    now = int(time.time())
    header = {"typ": "JWT", "alg": "RS256", "x5c": [chain]}
    times = {"iat": now, "nbf": now - 10, "exp": now + 300}
    claims = {"iss": ISSUER, "aud": SERVICE, "sub": "", "jti": str(now), **times, "access": access}
    text = _part(json.dumps(header).encode()) + b"." + _part(json.dumps(claims).encode())
    signed = subprocess.run(["openssl", "dgst", "-sha256", "-sign", key], input=text, capture_output=True, check=True)
    return (text + b"." + _part(signed.stdout)).decode()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        who = self.headers.get("Authorization")
        if who not in (None, PASSWORD):
            self._answer(401, {"errors": [{"code": "UNAUTHORIZED", "message": "wrong password"}]})
            return
        access = []
        for scope in parse_qs(urlsplit(self.path).query).get("scope", []):
            kind, name, actions = scope.split(":", 2)
            wanted = actions.split(",")
            allowed = wanted if who else [action for action in wanted if action == "pull" and name.startswith("public/")]
            access.append({"type": kind, "name": name, "actions": allowed})
        self._answer(200, {"token": token(sys.argv[2], sys.argv[3], access), "expires_in": 300})

    def _answer(self, code: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
