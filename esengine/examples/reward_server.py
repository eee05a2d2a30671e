"""A reward in another process: a scorer behind HTTP, which may need other packages or another GPU than the run.

`python reward_server.py 8000` serves until Ctrl-C, and `--reward "remote(url=http://127.0.0.1:8000)"` asks it. Without
an argument the script starts such a server, trains with it, and stops it.
"""

import base64
import io
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image, ImageStat


def score(image: Image.Image, prompt: str) -> float:
    """Brightness in [0, 1]. Put your model here."""
    return ImageStat.Stat(image.convert("L")).mean[0] / 255


class Scorer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = [Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]) for png in body["images"]]
        scores = [score(image, prompt) for image, prompt in zip(images, body["prompts"], strict=True)]
        answer = json.dumps({"scores": scores}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        """Nothing is printed for each request."""


def serve(port: int) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", port), Scorer)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def main() -> None:
    from esengine.examples.own_reward import train
    from esengine.rewards import Remote

    server = subprocess.Popen([sys.executable, __file__, "0"], stdout=subprocess.PIPE, text=True)  # 0: any free port
    try:
        train(Remote(server.stdout.readline().strip()))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    serve(int(sys.argv[1])) if len(sys.argv) > 1 else main()
