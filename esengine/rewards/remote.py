"""A reward from a scoring service over HTTP. It sends PNG images and prompts as JSON, and receives scores as JSON.

POST url    {"images": ["<base64 of a PNG>", ...], "prompts": ["...", ...], "metadata": [{...}, ...]}
200         {"scores": [0.5, null, ...]}    one finite number for each image, in their order; null: no score

`metadata` has the columns of each prompt in the prompt file, an empty object if it has none. A request has at most
`batch` images, and at most `METADATA_LIMIT` bytes of metadata for each. An answer has at most `limit` bytes. With
`token_env` each request has the header `Authorization: Bearer <token>`.
"""

import base64
import contextlib
import http.client
import io
import ipaddress
import json
import math
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

import torch
from PIL import Image

from esengine.base.errors import ConfigError, RewardError
from esengine.base.printable import plain, without_secrets
from esengine.base.prompt_files import Metadata
from esengine.rewards.base import as_scores
from esengine.rewards.spec import ADVICE

FIRST_PAUSE = 0.5
"""Seconds before the second try; each further pause is twice as long."""
METADATA_LIMIT = 1 << 16
"""Most bytes of one prompt's metadata as JSON."""
_READ_AT_ONCE = 1 << 16


class Remote:
    """Scores images with a scoring service.

    Args:
        url: http or https, without a user or password. Characters beyond ASCII are encoded: IDNA in the host, percent
            signs behind it. Redirects are not followed. This computer is called directly; other hosts through the
            proxy of the environment, if there is one (`http_proxy`, `https_proxy`, `no_proxy`).
        timeout: seconds to connect, and seconds for a whole answer, even one that arrives slowly.
        retries: further tries after a failed connection, a timeout or a 5xx answer. Other answers are final.
        batch: images in one request.
        limit: most bytes of an answer.
        token_env: name of an environment variable that holds a token. Only the name is recorded.

    No record, message or page has the URL's query or the token.

    Raises:
        ConfigError: an argument that cannot be used, or the variable is not set.
    """

    reads_only = True
    overlaps = True

    def __init__(
        self,
        url: str = "",
        timeout: float = 60.0,
        retries: int = 3,
        batch: int = 16,
        limit: int = 1 << 20,
        token_env: str | None = None,
    ):
        parts = _parts(url)
        if parts is None:
            expected = "expected http://host:port/path or https, without a user or password"
            raise ConfigError(f"url: {expected}, got {_without_user(url)!r:.200}; {ADVICE}")
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ConfigError(f"timeout: expected seconds above 0, got {timeout!r}")
        for name, value, least in (("retries", retries, 0), ("batch", batch, 1), ("limit", limit, 1)):
            if type(value) is not int or value < least:
                raise ConfigError(f"{name}: expected an int of at least {least}, got {value!r}")
        self.url, self.timeout, self.retries, self.batch, self.limit = url, timeout, retries, batch, limit
        self.token_env, self._token = token_env, None if token_env is None else _token(token_env)
        self._sent_to, self._local = parts._replace(fragment="").geturl(), _is_local(parts.hostname)
        self._where = parts._replace(query="", fragment="").geturl()

    def __call__(
        self, images: torch.Tensor, prompts: list[str], metadata: Sequence[Metadata] | None = None
    ) -> torch.Tensor:
        """Score images, uint8 [B, 3, H, W] on any device. Returns float32 [B] on the CPU, NaN where there is no score.

        Without `metadata` none is sent.

        Raises:
            RewardError: the service gave no usable answer.
        """
        scores = [torch.empty(0)]
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            body = {"images": [_png(image) for image in images[part]], "prompts": list(prompts[part])}
            if metadata is not None:
                body["metadata"] = list(metadata[part])
            scores.append(self._scores(self._post(json.dumps(body).encode()), len(body["images"]), start))
        return torch.cat(scores)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Raises ConfigError for metadata that is too long to be sent."""
        for prompt, columns in zip(prompts, metadata, strict=True):
            if (size := len(json.dumps(columns))) > METADATA_LIMIT:
                what = f"expected at most {METADATA_LIMIT} bytes of columns for each prompt, got {size}"
                raise ConfigError(f"reward remote: {what} for {prompt!r:.60}")

    def settings(self) -> dict[str, Any]:
        """The service's URL without its query, which could hold a secret, and the name of the token's variable."""
        return {"url": self._where} | ({"token_env": self.token_env} if self.token_env else {})

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self._sent_to, body, headers, method="POST")
        if self._token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        tries = self.retries + 1
        for attempt in range(tries):
            if attempt:
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
            try:
                return self._read(request)
            except urllib.error.HTTPError as e:
                e.close()
                error, answer_text = e, f"answered {e.code} {self._hidden(plain(e.reason))[:80]}"
                if e.code < 500:
                    raise RewardError(f"{self._where}: {answer_text}") from e
            except (OSError, http.client.HTTPException) as e:
                error = e
                answer_text = self._hidden(plain(getattr(e, "reason", None) or e))[:200] or type(e).__name__
            except ValueError as e:  # urllib's, for the address of a proxy that is none
                raise RewardError(f"{self._where}: cannot be called, {self._hidden(plain(e))[:200]}") from e
        raise RewardError(f"{self._where}: no answer after {tries} tries; the last one: {answer_text}") from error

    def _read(self, request: urllib.request.Request) -> bytes:
        answer = bytearray()
        with _Deadline(self.timeout) as deadline:
            direct = [urllib.request.ProxyHandler({})] if self._local else []
            opener = urllib.request.build_opener(_NoRedirect, _Http(deadline), _Https(deadline), *direct)
            with opener.open(request, timeout=self.timeout) as response:
                if response.status != 200:
                    raise RewardError(f"{self._where}: expected status 200, got {response.status}")
                while some := response.read1(_READ_AT_ONCE):
                    answer += some
                    if len(answer) > self.limit:
                        raise RewardError(f"{self._where}: its answer is longer than limit={self.limit} bytes")
                if response.length:
                    raise ConnectionError(f"its answer broke off {response.length} bytes before its end")
        return bytes(answer)

    def _scores(self, answer: bytes, count: int, start: int) -> torch.Tensor:
        """The scores of an answer for the images from `start` on, float32 [count] with NaN for null."""
        try:
            scores = [_finite(score) for score in json.loads(answer)["scores"]]
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as e:
            answer_text = self._hidden(answer[:1000].decode(errors="replace"))[:80]
            expected = '{"scores": [finite numbers]}'
            raise RewardError(f"{self._where}: expected {expected}, got {answer_text!r}; null is no score") from e
        if len(scores) != count:
            raise RewardError(f"{self._where}: expected {count} scores, got {len(scores)}")
        try:
            return as_scores(scores, count)
        except RewardError as e:
            raise RewardError(f"{self._where}: {e}", images=[start + row for row in e.images]) from e

    def _hidden(self, text: str) -> str:
        """A text of the service without the token, which it may repeat."""
        return text if not self._token else text.replace(self._token, "...")


class _Deadline:
    """Closes the connections of one request after `seconds`, in any state. The request then raises TimeoutError.

    A socket's own timeout restarts with every byte, and the standard library sets no time limit for reading a header.
    """

    def __init__(self, seconds: float):
        self.seconds, self.over = seconds, False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self._timer.cancel()
        for each in self._sockets:
            each.close()
        if self.over and not isinstance(error, urllib.error.HTTPError | RewardError):
            raise TimeoutError(f"its answer took longer than timeout={self.seconds} s") from error

    def watch(self, connection: http.client.HTTPConnection) -> http.client.HTTPConnection:
        create = connection._create_connection

        def created(*args: Any, **kwargs: Any) -> socket.socket:
            found = create(*args, **kwargs)
            self._sockets.append(found.dup())  # the original may later be wrapped for TLS or released
            return found

        connection._create_connection = created
        return connection

    def _end(self) -> None:
        self.over = True
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _Watched:
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self.deadline = deadline

    def do_open(self, kind: type, request: urllib.request.Request, **kwargs: Any) -> Any:
        return super().do_open(lambda *a, **k: self.deadline.watch(kind(*a, **k)), request, **kwargs)


class _Http(_Watched, urllib.request.HTTPHandler):
    pass


class _Https(_Watched, urllib.request.HTTPSHandler):
    pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None  # the redirect then raises like any other 3xx


def _png(image: torch.Tensor) -> str:
    """One image, uint8 [3, H, W], as the base64 of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _finite(score: Any) -> float | int | None:
    number = isinstance(score, int | float) and not isinstance(score, bool)
    if score is not None and not (number and math.isfinite(score)):
        raise ValueError(f"expected a finite number or null, got {score!r}")
    return score


def _parts(url: Any) -> SplitResult | None:
    """The parts of a URL in ASCII. None: it is not one that can be called."""
    try:
        if not isinstance(url, str) or any(c.isspace() or not c.isprintable() for c in url):
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            return None
        host, port = parts.hostname.encode("idna").decode("ascii"), parts.port
    except ValueError:  # a port that is no number, or a host without IDNA
        return None
    host = f"[{host}]" if ":" in host else host
    rest = {name: quote(getattr(parts, name), safe="%/:@!$&'()*+,;=?-._~[]|") for name in ("path", "query", "fragment")}
    return parts._replace(netloc=host if port is None else f"{host}:{port}", **rest)


def _without_user(url: Any) -> Any:
    """What was given as a URL, for a message: without what may be a user, a password or a query."""
    return without_secrets(f"...{url[url.rindex('@') :]}" if "@" in url else url) if isinstance(url, str) else url


def _is_local(host: str) -> bool:
    """Whether a host's name or address is this computer's own."""
    if host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # as 127.1
        except OSError:
            return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def _token(name: Any) -> str:
    """The token in an environment variable."""
    token = os.environ.get(name) if isinstance(name, str) and name and "=" not in name and "\0" not in name else None
    if not token:
        raise ConfigError(f"token_env: expected an environment variable that holds a token, {name!r:.80} holds none")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(f"token_env: expected a token of printable ASCII without spaces in {name}, got another text")
    return token
