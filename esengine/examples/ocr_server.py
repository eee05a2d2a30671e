"""An HTTP scorer that compares the text in an image with a column of the prompt file. Standard library only.

    python -m esengine.examples.ocr_server --reader my_ocr:read --column target --port 8000
    esengine train --prompts signs.jsonl --reward "remote(url=http://127.0.0.1:8000)"

    score = 1 - distance(text, target) / max(|text|, |target|)

`distance` is the number of characters to insert, delete or replace. Case and white space do not count. A reader is a
function from the bytes of a PNG to a text. The default one runs `tesseract`. An image whose prompt has no target has no
score. The protocol is that of `esengine.rewards.remote`.
"""

import argparse
import base64
import binascii
import importlib
import json
import subprocess
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reader = Callable[[bytes], str]
MAX_BODY = 1 << 28
"""Most bytes of a request."""


def tesseract(png: bytes) -> str:
    """The text that the program `tesseract` reads in an image."""
    command = ["tesseract", "stdin", "stdout"]
    return subprocess.run(command, input=png, capture_output=True, check=True, timeout=60).stdout.decode()


def distance(one: str, other: str) -> int:
    """Levenshtein's edit distance."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        before, row = row, [i]
        for j, b in enumerate(other, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def similarity(text: str, target: str) -> float:
    """1 - normalised edit distance, in [0, 1]. Two empty texts are equal."""
    text, target = (" ".join(each.casefold().split()) for each in (text, target))
    return 1 - distance(text, target) / max(len(text), len(target), 1)


def scores(body: dict[str, Any], read: Reader, column: str) -> list[float | None]:
    """The scores of a request. Raises KeyError, TypeError or ValueError if it does not follow the protocol."""
    found: list[float | None] = []
    for png, columns in zip(body["images"], body["metadata"], strict=True):
        target = columns.get(column)
        text = None if target is None else read(base64.b64decode(png, validate=True))
        found.append(None if text is None else similarity(text, str(target)))
    return found


def server(read: Reader, column: str = "target", host: str = "127.0.0.1", port: int = 8000) -> ThreadingHTTPServer:
    """A server that is not started yet: call `serve_forever`. Port 0 takes a free one, `server_port`."""

    class Scorer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if not 0 < size <= MAX_BODY:
                return self.send_error(413)
            try:
                answer = {"scores": scores(json.loads(self.rfile.read(size)), read, column)}
            except (KeyError, TypeError, ValueError, AttributeError, binascii.Error, RecursionError):
                return self.send_error(400)
            except Exception as error:  # the reader's: the client tries again
                return self.send_error(500, type(error).__name__)
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    return ThreadingHTTPServer((host, port), Scorer)


def main(args: list[str] | None = None) -> None:
    """Run the server until it is stopped. Prints its address."""
    parser = argparse.ArgumentParser(description="Scores the text in images against a column of the prompt file.")
    parser.add_argument("--reader", default=f"{__name__}:tesseract", help="module:function from PNG bytes to text")
    parser.add_argument("--column", default="target", help="column of the prompt file that has the wanted text")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args(args)
    module, _, function = given.reader.partition(":")
    read = getattr(importlib.import_module(module), function)
    with server(read, given.column, port=given.port) as serving:
        print(f"http://127.0.0.1:{serving.server_port}", flush=True)
        serving.serve_forever()


if __name__ == "__main__":
    main()
