"""A server that answers as vLLM does, from a model in this process, until it is told to misbehave.

For what a real server does too seldom to be waited for.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_dskd.models.heads import captured_head_input


class RudeServer:
    """Serves a teacher on 127.0.0.1.

    Attributes:
        url: where.
        misbehave: each next question about a text takes one of these instead of answering: a
            function of the handler and of the answer that would be right.
        change: what is done to the states [L, D], or log-probabilities [L, V], that are given.
        max_logprobs: more are refused.
        requests: the headers of every request.
        max_model_len: longer texts are refused.
        most_at_once: of questions about a text.
    """

    def __init__(self, teacher: str) -> None:
        self.teacher = teacher
        self.model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(teacher)
        self.misbehave: deque[Callable[[Any, Any], None]] = deque()
        self.change: Callable[[torch.Tensor], torch.Tensor] = lambda states: states
        self.max_model_len = 512
        self.max_logprobs = 64
        self.requests: list[dict[str, str]] = []
        self.delay = 0.0
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append(dict(self.headers))
                model = {"id": teacher, "max_model_len": outer.max_model_len}
                self.answer(json.dumps({"data": [model]}).encode())

            def do_POST(self) -> None:
                outer.requests.append(dict(self.headers))
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.path == "/tokenize":
                    ids = outer.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
                    self.answer(json.dumps({"tokens": ids}).encode())
                else:
                    with outer._counted():
                        ask = outer._complete if self.path == "/v1/completions" else outer._pool
                        ask(self, body)

            def answer(
                self, content: bytes, status: int = 200, headers: dict[str, str] | None = None
            ) -> None:
                self.send_response(status)
                for name, value in {"content-length": len(content), **(headers or {})}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._http.shutdown()
        self._http.server_close()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            time.sleep(self.delay)
            yield
        finally:
            with self._lock:
                self._now -= 1

    def _pool(self, handler: Any, body: dict[str, Any]) -> None:
        assert body["task"] == "token_embed"
        assert body["use_activation"] is False
        if len(body["input"][0]) > self.max_model_len:
            handler.answer(b"too long", 400)
            return
        with self._lock, torch.no_grad(), captured_head_input(self.model) as captured:
            self.model(input_ids=torch.tensor(body["input"]))
        states = self.change(captured[0][0].to(getattr(torch, body["embed_dtype"])))
        shape, kind = list(states.shape), body["embed_dtype"]
        entry = {"shape": shape, "embed_dtype": kind, "endianness": "little"}
        headers = {"metadata": json.dumps({"data": [entry]})}
        self._give(handler, states.contiguous().view(torch.uint8).numpy().tobytes(), headers)

    def _complete(self, handler: Any, body: dict[str, Any]) -> None:
        ids, k = body["prompt"], body["prompt_logprobs"]
        assert (body["max_tokens"], body["temperature"], body["top_p"]) == (1, 1.0, 1.0)
        if len(ids) >= self.max_model_len or k > self.max_logprobs:
            handler.answer(b"too long" if k <= self.max_logprobs else b"too many logprobs", 400)
            return
        with self._lock, torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0]
        said = self.change(logits.log_softmax(-1))
        entries: list[Any] = [None]
        for row, label in zip(said, ids[1:], strict=False):
            named = [label, *(i for i in row.topk(k).indices.tolist() if i != label)]
            entries.append({str(i): {"logprob": max(float(row[i]), -9999.0)} for i in named})
        content = json.dumps({"choices": [{"prompt_logprobs": entries}]}).encode()
        self._give(handler, content, {"content-type": "application/json"})

    def _give(self, handler: Any, content: bytes, headers: dict[str, str]) -> None:
        if self.misbehave:
            self.misbehave.popleft()(handler, (content, headers))
        else:
            handler.answer(content, headers=headers)
