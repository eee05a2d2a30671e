import base64
import io
import json
import socket
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esengine import rewards
from esengine.base.errors import ConfigError, RewardError
from esengine.rewards import remote

EXAMPLE = """
import base64, io, json
from http.server import BaseHTTPRequestHandler, HTTPServer

from PIL import Image, ImageStat


def score(image: Image.Image, prompt: str) -> float:
    return ImageStat.Stat(image.convert("L")).mean[0] / 255  # brightness: put your model here


class Scorer(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = [Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]) for png in body["images"]]
        answer = json.dumps({"scores": [score(*pair) for pair in zip(images, body["prompts"])]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


HTTPServer(("127.0.0.1", 8000), Scorer).serve_forever()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve():
    """Answer each POST with the next of the functions of (handler, body), the last one for ever. Gives url, bodies."""
    servers = []

    def start(*answers):
        bodies, left = [], list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = left.pop(0) if len(left) > 1 else left[0]
                answer(self, bodies[-1])

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *where: None  # clients hang up on purpose
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/score", bodies

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def reply(data, status=200, **headers):
    def answer(handler, body):
        text = data if isinstance(data, bytes) else json.dumps(data).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(text)

    return answer


def means(handler, body):
    pictures = [Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]) for png in body["images"]]
    reply({"scores": [float(np.asarray(picture).mean()) for picture in pictures]})(handler, body)


def test_images_and_prompts_arrive_whole_in_bounded_requests(serve, images):
    url, bodies = serve(means)
    batch, prompts = images(5), ["a", "Öl ✓", "c", "", "e"]
    scores = rewards.load("remote", url=url, batch=2)(batch.permute(0, 1, 3, 2), prompts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, batch.double().mean((1, 2, 3)).float(), rtol=1e-6, atol=0)
    assert [len(body["images"]) for body in bodies] == [2, 2, 1]
    assert [prompt for body in bodies for prompt in body["prompts"]] == prompts
    picture = Image.open(io.BytesIO(base64.b64decode(bodies[0]["images"][0])))
    assert np.array_equal(np.asarray(picture), batch[0].permute(2, 1, 0).numpy())


def test_no_image_is_no_request(serve):
    url, bodies = serve(means)
    assert rewards.load("remote", url=url)(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), []).shape == (0,)
    assert bodies == []


def test_a_server_that_recovers_is_asked_again(serve, images):
    url, bodies = serve(reply(b"busy", 503), reply(b"", 500), lambda handler, body: handler.wfile.close(), means)
    scores = rewards.load("remote", url=url)(images(2), ["a", "b"])
    assert scores.shape == (2,)
    assert len(bodies) == 4
    assert bodies[0] == bodies[3]


@pytest.mark.parametrize(("retries", "tries"), [(0, 1), (2, 3)])
def test_a_server_that_does_not(serve, images, retries, tries):
    url, bodies = serve(reply(b"no", 502))
    with pytest.raises(RewardError, match=rf"{tries} tries.*502"):
        rewards.load("remote", url=url, retries=retries)(images(1), ["a"])
    assert len(bodies) == tries


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_refusal_is_final(serve, images, status):
    url, bodies = serve(reply({"error": "x"}, status))
    with pytest.raises(RewardError, match=str(status)):
        rewards.load("remote", url=url)(images(1), ["a"])
    assert len(bodies) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(serve, images, status):
    target, reached = serve(means)
    for location in (target, "file:///etc/passwd"):
        url, bodies = serve(reply(b"", status, Location=location))
        with pytest.raises(RewardError, match=str(status)):
            rewards.load("remote", url=url)(images(1), ["a"])
        assert len(bodies) == 1
    assert reached == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "got ''"),
        (b"\x80\x04K\x01.", "expected"),
        (b"[0.5, 0.5]", "expected"),
        ({"score": [1, 2]}, r'expected \{"scores": \[finite numbers\]\}, got'),
        ({"scores": 3}, "finite numbers"),
        ({"scores": "ab"}, "finite numbers"),
        ({"scores": [1, True]}, "finite numbers"),
        ({"scores": [1, "2"]}, "finite numbers"),
        ({"scores": [1, [2]]}, "finite numbers"),
        (b'{"scores": [1, NaN]}', "finite numbers"),
        (b'{"scores": [1, -Infinity]}', "finite numbers"),
        (b'{"scores": [1, 1e999]}', "finite numbers"),
        (b'{"scores": [1, 1' + b"0" * 400 + b"]}", "finite numbers"),
        (b"[" * 100_000, "finite numbers"),
        ({"scores": [1]}, "expected 2 scores, got 1"),
        ({"scores": [1, 2, 3]}, "expected 2 scores, got 3"),
        ({"scores": {"0": 1, "1": 2}}, "finite numbers"),
    ],
)
def test_an_answer_that_is_none(serve, images, answer, message):
    url, bodies = serve(reply(answer))
    with pytest.raises(RewardError, match=message) as caught:
        rewards.load("remote", url=url)(images(2), ["a", "b"])
    assert len(bodies) == 1
    assert len(str(caught.value)) < 400


def test_a_score_beyond_float32_is_caught_by_the_check(serve, images):
    url, _ = serve(reply({"scores": [1, 1e300]}))
    with pytest.raises(RewardError, match="inf") as caught:
        rewards.parse(f"remote(url={url})").score(images(2), ["a", "b"], step=2, members=[5, 7])
    error = caught.value
    assert (error.reward, error.step, error.images, error.prompt) == ("remote", 2, (7,), "b")


def test_null_is_no_score(serve, images):
    url, _ = serve(reply({"scores": [1, None]}))
    scores = rewards.load("remote", url=url)(images(2), ["a", "b"])
    assert scores[0] == 1
    assert scores[1].isnan()
    with pytest.raises(RewardError, match="nan") as caught:
        rewards.parse(f"remote(url={url})").score(images(2), ["a", "b"], step=2, members=[5, 7])
    assert (caught.value.reward, caught.value.images) == ("remote", (7,))


def test_an_integer_that_float32_would_round_is_refused(serve, images):
    url, _ = serve(reply({"scores": [1, (1 << 24) + 1]}))
    with pytest.raises(RewardError, match="exactly"):
        rewards.load("remote", url=url)(images(2), ["a", "b"])


def test_metadata_is_sent_beside_the_prompts_and_only_if_there_is_some_to_send(serve, images):
    url, bodies = serve(means)
    columns = [{"target": "Öl", "n": [1, {"a": None}]}, {}, {"target": "b"}]
    reward = rewards.parse(f"remote(url={url},batch=2)")
    reward.score(images(3), ["a", "b", "c"], metadata=columns)
    assert [body["metadata"] for body in bodies] == [columns[:2], columns[2:]]
    rewards.load("remote", url=url)(images(1), ["a"])
    assert bodies[-1].keys() == {"images", "prompts"}


def test_metadata_that_is_too_long_is_told_before_anything_is_sent(serve):
    url, bodies = serve(means)
    reward = rewards.parse(f"remote(url={url})")
    reward.check_prompts(["a"], [{"n": "x" * (remote.METADATA_LIMIT - 9)}])
    with pytest.raises(ConfigError, match=r"65536 bytes.*got 65537"):
        reward.check_prompts(["a"], [{"n": "x" * (remote.METADATA_LIMIT - 8)}])
    assert bodies == []


def test_an_endless_answer_is_cut(serve, images):
    def endless(handler, body):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(10_000):
            handler.wfile.write(b" " * 65536)

    url, bodies = serve(endless)
    with pytest.raises(RewardError, match="limit=1000"):
        rewards.load("remote", url=url, limit=1000)(images(1), ["a"])
    assert len(bodies) == 1


def test_an_answer_that_trickles_or_never_comes(serve, images):
    def trickles(handler, body):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    for answer in (trickles, lambda handler, body: time.sleep(1)):
        url, _ = serve(answer)
        with pytest.raises(RewardError, match=r"1 tries.*(timed out|longer)"):
            rewards.load("remote", url=url, timeout=0.2, retries=0)(images(1), ["a"])


class Drips(socketserver.BaseRequestHandler):
    """Sends its answer a byte at a time, each long before a socket's own time is over."""

    answer = b""

    def handle(self):
        self.request.recv(1 << 16)
        for byte in self.answer:
            time.sleep(0.02)
            try:
                self.request.sendall(bytes([byte]))
            except OSError:
                return


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 " + b"O" * 500,
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 500,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
        b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 500,
    ],
    ids=["status", "header", "continue", "body"],
)
def test_an_answer_that_drips_ends_at_the_deadline(images, answer):
    handler = type("Handler", (Drips,), {"answer": answer})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        reward = rewards.load("remote", url=f"http://127.0.0.1:{server.server_address[1]}", timeout=0.3, retries=0)
        with pytest.raises(RewardError, match=r"timeout=0.3"):
            reward(images(1), ["a"])
        server.shutdown()


@pytest.mark.parametrize("status", [404, 503])
def test_what_a_server_says_does_not_steer_the_terminal(images, status):
    class Shouts(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 16)
            self.request.sendall(b"HTTP/1.1 %d \x1b[31mred\x1b[0m\x07 %b\r\n\r\n" % (status, b"x" * 999))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Shouts) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        reward = rewards.load("remote", url=f"http://127.0.0.1:{server.server_address[1]}", retries=0)
        with pytest.raises(RewardError, match=f"{status} .*red") as caught:
            reward(images(1), ["a"])
        server.shutdown()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_an_answer_that_breaks_off_is_asked_for_again(serve, images):
    def broken(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b'{"sco')

    url, bodies = serve(broken, means)
    assert rewards.load("remote", url=url)(images(1), ["a"]).shape == (1,)
    assert len(bodies) == 2


def test_the_error_of_a_run_names_the_images_and_the_service(serve, images):
    url, _ = serve(reply(b"", 404))
    with pytest.raises(RewardError, match=r"http://127.*404") as caught:
        rewards.parse(f"remote(url={url})").score(images(2), ["a", "b"], step=3, members=[0, 1])
    assert (caught.value.reward, caught.value.step, caught.value.images) == ("remote", 3, (0, 1))


def test_nobody_there(images):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RewardError, match=r"2 tries.*refused"):
            rewards.load("remote", url=url, retries=1)(images(1), ["a"])


def test_not_http(images):
    class Babble(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"220 mail.example.org ESMTP\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Babble) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with pytest.raises(RewardError, match="1 tries"):
            rewards.load("remote", url=f"http://127.0.0.1:{server.server_address[1]}", retries=0)(images(1), ["a"])
        server.shutdown()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "file:///etc/passwd",
        "ftp://a/b",
        "http://",
        "http://a:port",
        "http://a b/",
        "http://a\n/",
        3,
    ],
)
def test_urls_that_are_none(url):
    with pytest.raises(ConfigError, match="url") as caught:
        rewards.load("remote", url=url)
    assert caught.value.setting == "reward remote"


def test_a_password_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="password") as caught:
        remote.Remote("http://me:secret@host/")
    assert caught.value.setting == "url"
    assert "secret" not in str(caught.value)


def test_a_query_stays_out_of_the_record():
    assert remote.Remote("https://host:1/score?token=abc").settings() == {"url": "https://host:1/score"}


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": "x"}, {"timeout": True}, {"retries": -1}, {"batch": 0}, {"limit": 1.5}]
)
def test_options_that_do_not_fit(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}: expected"):
        rewards.load("remote", url="http://127.0.0.1:1", **options)


def test_the_example_server(tmp_path, images):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "server.py").write_text(EXAMPLE.replace("8000", str(port)))
    process = subprocess.Popen([sys.executable, tmp_path / "server.py"], stderr=subprocess.DEVNULL)
    try:
        reward = rewards.parse(f"remote(url=http://127.0.0.1:{port},batch=3,retries=10)")
        remote.FIRST_PAUSE = 0.1
        batch = images(5)
        scores = reward.score(batch, list("abcde"))["remote"]
        grey = (batch.double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1).mean((1, 2)) / 255
        torch.testing.assert_close(scores, grey.float(), rtol=0, atol=3e-3)
    finally:
        process.kill()
        process.wait()
    guide = (Path(__file__).parents[2] / "esengine/README.md").read_text(encoding="utf-8")
    assert EXAMPLE.strip() in guide
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 20
