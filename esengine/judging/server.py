"""A page on this machine that asks a person which of two images is better.

GET  /TOKEN/               the page
GET  /TOKEN/question       {"id", "text", "done", "total", "title"}, or {"wait": a text} when nothing is to be answered
GET  /TOKEN/ID/left.png    the two images of question ID, in random order
GET  /TOKEN/ID/right.png
POST /TOKEN/answer         {"id", "choice": "left", "right" or "same"}; 204 once the answer is kept
POST /TOKEN/back           the last answer is taken back and asked again

The address holds a random token, and the Host header must be the server's. So other users of the machine and other
web pages can neither see the images nor answer.
"""

import hmac
import io
import json
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from esengine.base.errors import ConfigError

FIRST, SECOND, SAME = "first", "second", "same"
_PAGE = Path(__file__).with_name("page.html")
_POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
_LONGEST = 1000


@dataclass(frozen=True)
class Question:
    """Two images of one text.

    Attributes:
        text: the prompt.
        images: returns the two images, uint8 [H, W, 3] each. Called when they are shown, from another thread.
    """

    text: str
    images: Callable[[], tuple[np.ndarray, np.ndarray]]


class Asker:
    """Serves the page. Use it in a `with` statement, or call `close`.

    Args:
        host: address to listen on. 0.0.0.0 also answers other machines that know the whole address of the page.
        port: port to listen on; 0: any free one.

    Attributes:
        url: the address of the page.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0):
        self._token = secrets.token_urlsafe(12)
        self._round: _Round | None = None
        self._text = "Images are being drawn."
        try:
            self._server = _Server((host, port), _handler(self))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"judge: cannot listen on {host}:{port}: {error}; choose another port") from error
        self.port = self._server.server_address[1]
        self.host = host
        self.url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{self.port}/{self._token}/"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def wait(self, text: str) -> None:
        """Show a text until the next question."""
        self._text = text

    def ask(
        self,
        questions: Sequence[Question],
        keep: Callable[[int, str], None],
        *,
        title: str = "",
        done: int = 0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Ask all questions, in their order. Returns once every one is answered.

        Args:
            questions: the questions.
            keep: called in this thread with the index of a question and `FIRST`, `SECOND` or `SAME`. If an answer was
                taken back, it is called again for the same question.
            title: shown above the images.
            done: number of questions of the same title that were answered before.
            stopped: called several times a second. True ends the round.

        Returns:
            Whether all questions are answered.
        """
        self._round = current = _Round(questions, title, done)
        try:
            while current.at < len(questions):
                if stopped():
                    return False
                current.take(keep)
            return True
        finally:
            self._round = None
            current.ended.set()
            self._text = "Thank you. Images are being drawn."

    def close(self) -> None:
        """Stop serving the page."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # what the page asks for, in the server's threads

    def question(self) -> dict:
        """The current question as JSON values, or what the person waits for."""
        current = self._round
        if current is None or current.at >= len(current.questions):
            return {"wait": self._text}
        return {
            "id": current.name(current.at),
            "text": current.questions[current.at].text,
            "title": current.title,
            "done": current.done + current.at,
            "total": current.done + len(current.questions),
        }

    def image(self, name: str, side: str) -> bytes | None:
        """A PNG; None if the question is not one of the current round."""
        current = self._round
        index = None if current is None else current.index(name)
        if index is None or side not in ("left", "right"):
            return None
        images = current.questions[index].images()
        data = io.BytesIO()
        Image.fromarray(images[(side == "right") != current.swapped[index]]).save(data, "PNG", compress_level=1)
        return data.getvalue()

    def answer(self, name: str, choice: str) -> bool:
        """Whether the answer is kept. False if the question is not the current one, or the choice is unknown."""
        current = self._round
        if current is None or current.at >= len(current.questions) or name != current.name(current.at):
            return False
        if choice not in ("left", "right", "same"):
            return False
        index = current.at
        chosen = SAME if choice == "same" else (SECOND if (choice == "right") != current.swapped[index] else FIRST)
        return current.give(index, chosen)

    def back(self) -> bool:
        """Take the last answer back. False if there is no round."""
        current = self._round
        return current is not None and current.give(current.at - 1, None)

    def allowed(self, path: str, host: str | None) -> str | None:
        """The rest of a path behind the token. None for another token or another Host header."""
        token, _, rest = path.removeprefix("/").partition("/")
        name = (host or "").rpartition(":")[0]
        known = self.host == "0.0.0.0" or name in ("127.0.0.1", "localhost", self.host)
        same = hmac.compare_digest(token.encode(), self._token.encode())
        return rest if known and same else None


class _Round:
    """The questions of one call of `ask`. Answers go through a queue, so that the asking thread keeps them."""

    def __init__(self, questions: Sequence[Question], title: str, done: int):
        self.questions, self.title, self.done, self.at = questions, title, done, 0
        self.swapped = [bool(secrets.randbelow(2)) for _ in questions]
        self._key = secrets.token_hex(4)
        self.ended = threading.Event()
        self._given: queue.Queue[tuple[int, str | None, threading.Event]] = queue.Queue()

    def name(self, index: int) -> str:
        return f"{self._key}-{index}"

    def index(self, name: str) -> int | None:
        key, _, index = name.partition("-")
        if key != self._key or not index.isdecimal() or len(index) > 9 or not int(index) < len(self.questions):
            return None
        return int(index)

    def give(self, index: int, chosen: str | None) -> bool:
        """Hand an answer to the asking thread, and wait until it is kept. False if the round ends without it."""
        kept = threading.Event()
        self._given.put((index, chosen, kept))
        while not kept.wait(0.1):
            if self.ended.is_set():
                return kept.is_set()
        return True

    def take(self, keep: Callable[[int, str], None]) -> None:
        """Take one answer, or none within a fifth of a second."""
        try:
            index, chosen, kept = self._given.get(timeout=0.2)
        except queue.Empty:
            return
        if chosen is None:
            if index == self.at - 1 >= 0:
                self.at = index
        elif index == self.at:  # a second click on the same question is ignored
            keep(index, chosen)
            self.at = index + 1
        kept.set()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """A browser that goes away is no error."""


def _handler(asker: Asker) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def do_GET(self) -> None:
            rest = asker.allowed(self.path, self.headers.get("Host"))
            if rest == "":
                self._send(200, _PAGE.read_bytes(), "text/html; charset=utf-8")
            elif rest == "question":
                self._send(200, json.dumps(asker.question()).encode(), "application/json")
            elif rest and rest.endswith(".png") and (data := asker.image(*_image(rest))) is not None:
                self._send(200, data, "image/png")
            else:
                self._send(404)

        def do_POST(self) -> None:
            rest = asker.allowed(self.path, self.headers.get("Host"))
            if rest == "back":
                self._send(204 if asker.back() else 409)
            elif rest == "answer":
                self._send(204 if asker.answer(*self._choice()) else 409)
            else:
                self._send(404)

        def _choice(self) -> tuple[str, str]:
            try:
                length = max(0, min(int(self.headers.get("Content-Length", 0)), _LONGEST))
                found = json.loads(self.rfile.read(length))
                return str(found["id"]), str(found["choice"])
            except (ValueError, KeyError, TypeError, RecursionError):
                return "", ""

        def _send(self, status: int, data: bytes = b"", kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header(
                "Content-Security-Policy",
                "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
            )
            self.send_header("Referrer-Policy", "no-referrer")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments) -> None:
            pass

    return Handler


def _image(rest: str) -> tuple[str, str]:
    name, _, file = rest.partition("/")
    return name, file.removesuffix(".png")
