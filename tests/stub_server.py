"""A process that answers as a vLLM server does, without vLLM: stub_server.py PORT MODEL_FOLDER [KIND]

What it writes depends on the weights that it was told to load, on the seed and on the context, and on nothing else, as
with a real one; its words are noise. KIND spoils all answers from the start. POST /dies {"after": n} lets it refuse
every generation after n more, POST /counts gives how many there were.
"""

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT, KIND = sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else ""
STATE = {"version": "", "weights": "", "generated": 0, "left": 10**9}
VOCABULARY = json.loads((Path(ROOT) / "config.json").read_text())["vocab_size"]


def generate(ids: list[int], params: dict) -> dict:
    said = json.dumps([STATE["weights"], ids, params.get("seed", 0)]).encode()
    noise = hashlib.blake2b(said, digest_size=64).digest()
    length = params["max_tokens"] if noise[0] < 64 else min(params["max_tokens"], 2 + noise[0] % 5)
    stops = params.get("stop_token_ids", [])
    words = params.get("allowed_token_ids") or [i for i in range(VOCABULARY) if i not in stops]
    tokens = [words[noise[1 + i % 62] % len(words)] for i in range(length)]
    ends = length < params["max_tokens"]
    tokens[-1:] = stops[:1] if ends else tokens[-1:]
    logp = 0.0 if "allowed_token_ids" in params else -2.0
    content = [{"token_id": token, "logprob": logp} for token in tokens]
    choice = {"token_ids": tokens, "finish_reason": "stop" if ends else "length", "logprobs": {"content": content}}
    return {"choices": [choice | {"weight_versions": [{"version": STATE["version"], "start": 0}]}]}


def prompt_logprobs(ids: list[int], k: int) -> dict:
    lists = [None]
    for token in ids[1:]:
        likely = {str(i): {"logprob": -2.0 - i, "rank": i + 1} for i in range(k)}
        lists.append({str(token): {"logprob": -3.5, "rank": 50}, **likely})
    return {"choices": [], "prompt_logprobs": [None] * len(ids) if KIND == "nulls" else lists}


class Stub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(sent) if sent else {}
        if self.path == "/dies":
            STATE["left"] = body["after"]
        if self.path == "/collective_rpc" and body["method"] == "reload_weights":
            files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
            STATE["weights"] = hashlib.blake2b(b"".join(path.read_bytes() for path in files)).hexdigest()
        if self.path == "/update_weight_version":
            STATE["version"] = body["new_version"]
        whole = {"empty": b"{}", "list": b"[]", "404": b'{"detail":"Not Found"}'}.get(KIND)
        if whole:
            return self.answer(whole, 404 if KIND == "404" else 200)
        if self.path != "/inference/v1/generate":
            card = {"id": "x", "root": ROOT, "max_model_len": 512}
            card.pop({"no root": "root", "no length": "max_model_len"}.get(KIND), None)
            said = {"data": [card], "weight_version": STATE["version"], "generated": STATE["generated"]}
            return self.answer(json.dumps(said).encode())
        params = body["sampling_params"]
        if "prompt_logprobs" in params:
            return self.answer(json.dumps(prompt_logprobs(body["token_ids"], params["prompt_logprobs"])).encode())
        real = "allowed_token_ids" not in params  # else the client looks whether its log-probs are of the right kind
        STATE["generated"] += real
        STATE["left"] -= real
        if STATE["left"] < 0:
            return self.answer(b'{"error": {"message": "dead"}}', 500)
        return self.answer(json.dumps(generate(body["token_ids"], params)).encode())

    do_GET = do_POST

    def answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer.request_queue_size = 200
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Stub).serve_forever()
