"""The page that asks a person: its answers, and who may see and answer it."""

import http.client
import io
import json
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import chromium, needs_browser
from PIL import Image

from esengine.base.errors import ConfigError
from esengine.judging import FIRST, SAME, SECOND, Asker, Question

BLACK, WHITE = (np.full((8, 8, 3), value, dtype=np.uint8) for value in (0, 255))


def questions(count):
    return [Question(f"prompt {index}", lambda: (BLACK, WHITE)) for index in range(count)]


class Client:
    """Speaks to the page's server as a browser does."""

    def __init__(self, asker):
        self.parts = urlsplit(asker.url)

    def ask(self, method, where, body=None, path=None, host=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.parts.port, timeout=10)
        headers = {} if host is None else {"Host": host}
        connection.request(method, (self.parts.path if path is None else path) + where, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, data

    def question(self):
        return json.loads(self.ask("GET", "question")[1])

    def next(self):
        for _ in range(100):
            if "id" in (found := self.question()):
                return found
            time.sleep(0.05)
        raise AssertionError("no question")

    def side_of(self, name, white):
        """The side that shows the white image, or the black one."""
        for side in ("left", "right"):
            image = Image.open(io.BytesIO(self.ask("GET", f"{name}/{side}.png")[1]))
            if (np.asarray(image)[0, 0, 0] == 255) == white:
                return side
        raise AssertionError("the images are the same")

    def answer(self, name, choice):
        return self.ask("POST", "answer", json.dumps({"id": name, "choice": choice}))[0]


@pytest.fixture
def asked():
    """Asks questions in a thread; what was kept is in `kept`."""
    kept, threads, over = [], [], []
    with Asker() as asker:

        def start(count, **settings):
            keep = settings.pop("keep", lambda index, answer: kept.append((index, answer)))
            stopped, done = settings.pop("stopped", lambda: False), []
            settings["stopped"] = lambda: bool(over) or stopped()
            thread = threading.Thread(target=lambda: done.append(asker.ask(questions(count), keep, **settings)))
            thread.start()
            threads.append(thread)
            return thread, done

        yield asker, Client(asker), start, kept
        over.append(True)
    for thread in threads:
        thread.join(5)


def test_answers_name_the_image_and_not_the_side(asked):
    _, client, start, kept = asked
    thread, done = start(40)
    sides = []
    for index in range(40):
        found = client.next()
        assert (found["text"], found["done"], found["total"]) == (f"prompt {index}", index, 40)
        sides.append(client.side_of(found["id"], white=index % 2 == 0))
        assert client.answer(found["id"], sides[-1]) == 204
    thread.join(5)
    assert done == [True]
    assert kept == [(index, SECOND if index % 2 == 0 else FIRST) for index in range(40)]
    assert set(sides) == {"left", "right"}  # of 40 in random order, not all on one side


def test_no_difference_and_back(asked):
    _, client, start, kept = asked
    thread, done = start(2)
    first = client.next()["id"]
    assert client.ask("POST", "back")[0] == 204  # there is nothing to take back
    client.answer(first, "same")
    assert client.next()["text"] == "prompt 1"
    client.ask("POST", "back")
    assert client.next()["id"] == first
    client.answer(first, client.side_of(first, white=True))
    client.answer(client.next()["id"], "same")
    thread.join(5)
    assert kept == [(0, SAME), (0, SECOND), (1, SAME)]
    assert done == [True]


def test_what_is_no_answer_changes_nothing(asked):
    _, client, start, kept = asked
    start(1, stopped=lambda: bool(kept))
    name = client.next()["id"]
    for bad in ({"id": name}, {"id": name, "choice": "up"}, {"id": "x-0", "choice": "left"}, [], "x", {"id": 5}):
        assert client.ask("POST", "answer", json.dumps(bad))[0] == 409
    assert client.ask("POST", "answer", "{")[0] == 409
    assert client.ask("POST", "answer", "[" * 900)[0] == 409
    assert client.ask("POST", "elsewhere")[0] == 404
    for place in (f"{name}/up.png", "x-0/left.png", f"{name}9/left.png", "../server.py", "nothing"):
        assert client.ask("GET", place)[0] == 404
    assert kept == []
    client.answer(name, "same")
    assert client.answer(name, "same") == 409  # twice


def test_only_who_knows_the_address_sees_anything(asked):
    asker, client, start, kept = asked
    start(1, stopped=lambda: bool(kept))
    name = client.next()["id"]
    for path in ("/", "//", "/wrong/", asker.url.rstrip("/")[-3:] + "/"):
        for place in ("", "question", f"{name}/left.png"):
            assert client.ask("GET", place, path=path)[0] in (400, 404)
    assert client.ask("GET", "question", host="attacker.example:80")[0] == 404
    assert client.ask("POST", "answer", json.dumps({"id": name, "choice": "left"}), host="attacker.example")[0] == 404
    assert kept == []
    client.answer(name, "same")
    tokens = set()
    for _ in range(5):
        with Asker() as other:
            tokens.add(urlsplit(other.url).path)
    assert len(tokens) == 5


def test_a_round_ends_when_it_is_stopped_and_the_next_begins(asked):
    _, client, start, kept = asked
    stop = []
    thread, done = start(3, stopped=lambda: bool(stop), title="step 1")
    client.answer(client.next()["id"], "same")
    stop.append(True)
    thread.join(5)
    assert (done, len(kept)) == ([False], 1)
    assert "wait" in client.question()
    thread, done = start(2, done=1, title="step 2")
    found = client.next()
    assert (found["done"], found["total"], found["title"]) == (1, 3, "step 2")


def test_an_answer_that_cannot_be_kept_ends_the_round():
    failed = []

    def keep(index, answer):
        raise OSError("disk full")

    def ask():
        try:
            asker.ask(questions(1), keep)
        except OSError as error:
            failed.append(error)

    with Asker() as asker:
        client, thread = Client(asker), threading.Thread(target=ask)
        thread.start()
        name = client.next()["id"]
        sender = threading.Thread(target=client.answer, args=(name, "left"), daemon=True)
        sender.start()
        thread.join(5)
        assert [str(error) for error in failed] == ["disk full"]


def test_a_port_in_use_is_refused():
    with Asker() as asker, pytest.raises(ConfigError) as caught:
        Asker(port=asker.port)
    assert str(asker.port) in str(caught.value)
    with pytest.raises(ConfigError):
        Asker(host="203.0.113.1")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(375, 667), (1280, 800)])
def test_the_page_in_a_browser(asked, width, height, scheme):
    asker, _, start, kept = asked
    thread, done = start(4)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=True)
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.goto(asker.url)
        for press in (
            lambda: page.keyboard.press("ArrowDown"),
            lambda: page.click("#left"),
            lambda: page.keyboard.press("ArrowRight"),
            lambda: page.click("#same"),
        ):
            page.wait_for_selector("#pair:not([hidden])")
            count = len(kept)
            assert page.inner_text("#text") == f"prompt {count}"
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate("document.querySelector('#back').getBoundingClientRect().bottom") <= height
            assert page.evaluate("[...document.images].every((image) => image.naturalWidth && image.clientWidth > 50)")
            press()
            page.wait_for_function(f"document.querySelector('#text').textContent !== 'prompt {count}' || {count} === 3")
        thread.join(5)
        page.wait_for_selector("#wait:not([hidden])")
        found = Axe().run(page)
        assert found.response["violations"] == []
    assert done == [True]
    assert kept[0] == (0, SAME)
    assert {kept[1][1], kept[2][1]} <= {FIRST, SECOND}
    assert said == []


@needs_browser
def test_the_open_page_meets_the_accessibility_rules(asked):
    asker, client, start, kept = asked
    start(1, stopped=lambda: bool(kept))
    with chromium() as browser:
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme, bypass_csp=True)
            page.goto(asker.url)
            page.wait_for_selector("#pair:not([hidden])")
            assert Axe().run(page).response["violations"] == []
    client.answer(client.next()["id"], "same")
