"""Where the HTTP reward sends its requests, what secrets it sends, and that nothing of them is written or shown."""

import json
import logging
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from esengine import rewards
from esengine.base.errors import ConfigError, RewardError
from esengine.models.defaults import defaults
from esengine.rewards import remote
from esengine.rewards.roles import read_terms

SECRET = "HUNTER2-HUNTER2"
IMAGE = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
NO_PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "no_proxy", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    for name in NO_PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def service():
    """A service, which is also a proxy: (its address, (path, headers) of each request, status and text to answer)."""
    seen, answer = [], {"status": 200, "text": None}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            count = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["images"])
            seen.append((self.path, dict(self.headers)))
            text = (answer["text"] or json.dumps({"scores": [0.5] * count})).encode()
            self.send_response(answer["status"], answer.get("reason"))
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", seen, answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "LocalHost"])
def test_this_computer_is_called_directly(service, monkeypatch, host):
    address, seen, _ = service
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    rewards.load("remote", url=f"http://{host}:{address.rpartition(':')[2]}/score", retries=0)(IMAGE, ["a"])
    assert [path for path, _ in seen] == ["/score"]


@pytest.mark.parametrize("host", ["[::1]", "[::ffff:127.0.0.1]", "127.9.9.9", "a.localhost", "0.0.0.0", "localhost."])
def test_other_names_of_this_computer(host):
    assert remote.Remote(f"http://{host}:1/")._local


@pytest.mark.parametrize("host", ["example.org", "128.0.0.1", "[::2]", "localhost.example.org", "10.0.0.1"])
def test_names_of_others(host):
    assert not remote.Remote(f"http://{host}:1/")._local


def test_others_are_called_through_the_proxy(service, monkeypatch):
    address, seen, _ = service
    monkeypatch.setenv("http_proxy", f"http://{address}")
    reward = rewards.load("remote", url="http://scorer.invalid/score", retries=0)
    reward(IMAGE, ["a"])
    assert [path for path, _ in seen] == ["http://scorer.invalid/score"]
    monkeypatch.setenv("no_proxy", "scorer.invalid")
    with pytest.raises(RewardError, match="no answer"):
        reward(IMAGE, ["a"])
    assert len(seen) == 1


@pytest.mark.parametrize("proxy", ["ht!tp://x", "//", "http://me:HUNTER2-HUNTER2@127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_a_proxy_that_is_none_is_a_clear_error(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(RewardError, match=r"http://scorer\.invalid/score") as caught:
        rewards.load("remote", url="http://scorer.invalid/score", retries=0)(IMAGE, ["a"])
    assert SECRET not in str(caught.value)


def test_characters_beyond_ascii_are_encoded(service, monkeypatch):
    address, seen, _ = service
    rewards.load("remote", url=f"http://{address}/größe/图?ä=ö%20", retries=0)(IMAGE, ["a"])
    assert seen[0][0] == "/gr%C3%B6%C3%9Fe/%E5%9B%BE?%C3%A4=%C3%B6%20"
    monkeypatch.setenv("http_proxy", f"http://{address}")
    rewards.load("remote", url="http://bücher.invalid/", retries=0)(IMAGE, ["a"])
    assert seen[1][0] == "http://xn--bcher-kva.invalid/"


@pytest.mark.parametrize(
    "url", [f"http://{'a' * 70}/", "http://a..b/", "http://\ud800/", "http://a\u202eb/", f"http://{'ä' * 80}/"]
)
def test_a_host_that_no_network_has(url):
    with pytest.raises(ConfigError, match="url: expected"):
        remote.Remote(url)


def test_the_token_comes_from_the_environment(service, monkeypatch):
    address, seen, answer = service
    monkeypatch.setenv("SCORER", SECRET)
    reward = rewards.load("remote", url=f"http://{address}/score", token_env="SCORER", retries=0)
    reward(IMAGE, ["a"])
    assert seen[0][1]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in json.dumps(reward.settings())
    assert reward.settings()["token_env"] == "SCORER"
    for status, text, reason in ((401, "no", f"bad {SECRET}"), (500, "no", SECRET), (200, f"what is {SECRET}?", "OK")):
        answer.update(status=status, text=text, reason=reason)
        with pytest.raises(RewardError) as caught:
            reward(IMAGE, ["a"])
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", f"{SECRET}\r\nX: y", f"{SECRET} x", f"{SECRET}é"])
def test_a_token_that_cannot_be_sent(monkeypatch, value):
    monkeypatch.delenv("SCORER", raising=False)
    if value is not None:
        monkeypatch.setenv("SCORER", value)
    with pytest.raises(ConfigError, match="SCORER") as caught:
        remote.Remote("http://h/", token_env="SCORER")
    assert caught.value.setting == "token_env"
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", [3, "", "a=b", "a\0b"])
def test_no_name_of_a_variable(name):
    with pytest.raises(ConfigError, match="token_env"):
        remote.Remote("http://h/", token_env=name)


URLS = [f"http://h/s?token={SECRET}", f"https://me:{SECRET}@h/s", f"https://{SECRET}@h/s", f"http://h/s#{SECRET}"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("spec", ["remote(url='{}')", 'clip_text,my:Score(where="{}")=0.5'])
def test_a_run_refuses_a_url_with_a_secret(url, spec):
    for given in ((spec.format(url), "none"), ("jpeg_compressibility", spec.format(url))):
        with pytest.raises(ConfigError, match="token_env=NAME") as caught:
            read_terms(*given, defaults("tiny"))
        assert SECRET not in str(caught.value)


SPECS = ["remote(url='{}')", "remote(url='{}',batch=0)", "remote(url='{}'", "a=b,remote(url='{}')"]


@pytest.mark.parametrize(
    ("url", "spec", "by"),
    [
        *((url, SPECS[0], "reward") for url in URLS),
        *((f"me:{SECRET}@h/s", spec, "reward") for spec in SPECS),
        *((URLS[0], spec, by) for spec in SPECS[1:] for by in ("heldout-reward", "config")),
    ],
)
def test_the_command_neither_writes_nor_shows_it(esengine, workspace, caplog, url, spec, by):
    spec = spec.format(url)
    args = [f"--{by}", spec]
    if by == "config":
        (workspace.parent / "c.yaml").write_text(json.dumps({"reward": spec}))
        args = ["--config", workspace.parent / "c.yaml"]
    caplog.set_level(logging.DEBUG)
    code, out, err = esengine("train", "--model", "tiny", "--run-dir", "run", *args)
    assert code == 1
    assert "error" in err
    assert SECRET not in out + err + caplog.text
    for file in workspace.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()


SCRIPT = """
import sys
from esengine.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_with_a_token_goes_on_and_leaves_no_trace_of_it(service, small, workspace, prompt_files):
    address, seen, _ = service
    spec = f"remote(url=http://{address}/score,token_env=SCORER)"
    sizes = ["--population", "4", "--es.prompts-per-step", "1", "--es.repeats", "1", "--heldout-every", "1"]
    files = ["--prompts", prompt_files[0], "--eval-prompts", prompt_files[1], "--lora.targets", "to_q"]
    environment = {**os.environ, "SCORER": SECRET}
    said = ""
    for more in (["--model", "tiny", "--reward", spec, *sizes, *files, "--steps", "1"], ["--resume", "--steps", "2"]):
        command = [sys.executable, "-c", SCRIPT, "train", "--run-dir", "run", *map(str, more)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert all(headers["Authorization"] == f"Bearer {SECRET}" for _, headers in seen)
    assert SECRET not in said
    assert not [file for file in Path("run").rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    done = subprocess.run([sys.executable, "-c", SCRIPT, "replay", "run"], capture_output=True, text=True, check=False)
    assert "bit for bit" in done.stdout
