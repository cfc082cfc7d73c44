"""A process between a client and a real vLLM server that spoils answers: faulty_proxy.py PORT TARGET_PORT

POST /fault {"kind": ..., "times": n} sets what happens to the next n answers to /inference/v1/generate; see spoil().
"""

import http.client
import json
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULT = {"kind": "", "times": 0}


def spoil(kind: str, body: bytes) -> bytes:
    """The answer with fewer log-probs than tokens, or with such that are no numbers, or as raw_logprobs would be."""
    answer = json.loads(body)
    entries = answer["choices"][0]["logprobs"]["content"] if answer["choices"][0]["logprobs"] else []
    scored = [entry for place in (answer["prompt_logprobs"] or [])[1:] for entry in place.values()]
    if kind == "short":
        del entries[-1:], (answer["prompt_logprobs"] or [])[-1:]
    for entry in entries + scored:
        entry["logprob"] = {"nan": float("nan"), "inf": -float("inf"), "raw": -1.0}.get(kind, entry["logprob"])
    return json.dumps(answer).encode()


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/fault":
            FAULT.update(json.loads(sent))
            self.answer(200, b"{}")
            return
        kind = FAULT["kind"] if self.path == "/inference/v1/generate" and FAULT["times"] > 0 else ""
        FAULT["times"] -= bool(kind)
        if kind == "close":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if kind in ("500", "403"):
            self.answer(int(kind), b'{"error": {"message": "spoilt"}}')
            return
        upstream = http.client.HTTPConnection("127.0.0.1", int(sys.argv[2]), timeout=100)
        upstream.request(self.command, self.path, sent or None, {"Content-Type": "application/json"})
        answer = upstream.getresponse()
        body = answer.read()
        if kind == "slow":
            time.sleep(6)
        if kind in ("short", "nan", "inf", "raw"):
            body = spoil(kind, body)
        self.answer(answer.status, body, cut=kind == "cut")

    do_GET = do_POST

    def answer(self, status: int, body: bytes, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, *args) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Proxy).serve_forever()
