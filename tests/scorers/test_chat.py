"""The client of chat servers: what it sends, what it asks again, and what it refuses."""

from __future__ import annotations

import logging
import socket
import threading
import time
from email.utils import formatdate

import pytest
import requests
from PIL import Image

from deradiff.scorers import chat
from deradiff.scorers.chat import (
    ATTEMPTS,
    FIRST_WAIT,
    LONGEST_WAIT,
    ChatClient,
    NoAnswer,
    Pace,
    images_message,
)
from deradiff.scorers.spec import Endpoint
from tests.support.chat_server import QuickClock, Reply, answer, chat_server, error
from tests.support.scorer_images import noise

KEY = "sk-secret-0123456789"
HELLO = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]


@pytest.fixture
def clock():
    return QuickClock()


@pytest.fixture
def client(server, clock, monkeypatch):
    """A client with a key, whose server says "yes"."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.replies("yes")
    settings = {"price_in": 2.0, "price_out": 10.0, "api_key_variable": "JUDGE_KEY"}
    return ChatClient(Endpoint(server.url, "eye-1", **settings), clock)


def test_a_request_is_what_the_endpoint_takes(server, client):
    assert client.ask(HELLO) == "yes"
    (question,) = server.questions
    assert question.path == "/v1/chat/completions"
    assert question.headers["Authorization"] == f"Bearer {KEY}"
    assert question.body == {
        "model": "eye-1",
        "messages": HELLO,
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": 1024,
    }


@pytest.mark.parametrize("ending", ["/", "/chat/completions", "/chat/completions/"])
def test_the_address_may_be_written_in_full(server, clock, ending):
    server.replies("yes")
    ChatClient(Endpoint(server.url + ending, "eye-1"), clock).ask(HELLO)
    assert server.questions[0].path == "/v1/chat/completions"
    assert "Authorization" not in server.questions[0].headers


def test_images_arrive_as_they_are_and_in_order(server, client):
    images = [noise((20, 13), 1), noise((7, 40), 2)]
    client.ask([images_message(images, "which?", None)])
    (question,) = server.questions
    assert question.text == "which?"
    assert [image.tobytes() for image in question.images] == [i.tobytes() for i in images]
    kinds = [part["type"] for part in question.body["messages"][0]["content"]]
    assert kinds == ["image_url", "image_url", "text"]


def test_large_images_are_reduced_and_small_ones_are_not(server, client):
    images = [Image.new("RGB", size) for size in ((64, 16), (10, 12), (400, 1))]
    client.ask([images_message(images, "?", 32)])
    assert [image.size for image in server.questions[0].images] == [(32, 8), (10, 12), (32, 1)]


# What is asked again


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_a_fault_is_asked_again(server, client, clock, status):
    server.replies(error("busy", status), error("busy", status), "yes")
    assert client.ask(HELLO) == "yes"
    assert len(server.questions) == 3
    assert client.usage.repeats == 2 and client.usage.answers == 1
    first, second = clock.waits
    assert FIRST_WAIT / 2 <= first <= FIRST_WAIT <= second <= 2 * FIRST_WAIT


TORN = {
    "half a body": Reply(b'{"choices": [{"mess'),
    "no json": Reply(b"<html>"),
    "empty": Reply(b""),
    "not utf-8": Reply(b"\xff\xfe"),
    "no choices": Reply({"choices": []}),
    "another form": Reply({"choices": {"0": 1}}),
    "a list": Reply(b"[1]"),
    "null": Reply(b"null"),
    "a message that is text": Reply({"choices": [{"message": "yes"}]}),
    "no text": Reply(answer(None)),
    "parts": Reply(answer([{"type": "text", "text": "yes"}])),
    "nested too deep": Reply(b"[" * 100_000),
    "shorter than announced": Reply("yes", 200, {"Content-Length": "9999"}),
    "not gzip": Reply(b"yes", 200, {"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_answer_is_asked_again(server, client, torn):
    server.replies(TORN[torn], "yes")
    assert client.ask(HELLO) == "yes"
    assert len(server.questions) == 2


def test_an_answer_without_end_is_cut(server, client, monkeypatch):
    monkeypatch.setattr(chat, "MOST_BYTES", 1000)
    server.replies(Reply(Reply("no").encoded() + b" " * 100_000), "yes")
    assert client.ask(HELLO) == "yes"


def test_the_server_says_how_long_to_wait(server, client, clock):
    server.replies(error("slow", 429, **{"Retry-After": "17"}), "yes")
    client.ask(HELLO)
    assert clock.waits == [17]

    in_a_minute = formatdate(clock.date() + 60, usegmt=True)
    server.replies(error("slow", 503, **{"Retry-After": in_a_minute}), "yes")
    client.ask(HELLO)
    assert clock.waits[1] == pytest.approx(60, abs=1)

    server.replies(error("slow", 429, **{"Retry-After": "soon"}), "yes")
    client.ask(HELLO)
    assert clock.waits[2] <= FIRST_WAIT


@pytest.mark.parametrize(("status", "waits"), [(429, [30, 30]), (503, [30, 30]), (500, [30])])
def test_a_limit_holds_every_request_and_a_fault_its_own(server, client, clock, status, waits):
    """Another question is asked while the first one waits."""
    server.replies(error("slow", status, **{"Retry-After": "30"}), "yes")
    wait = clock.wait

    def ask_another(seconds, stopped):
        clock.wait = lambda seconds, stopped: wait(30, stopped)
        client.ask(HELLO)
        clock.waits.append(seconds)

    clock.wait = ask_another
    client.ask(HELLO)
    assert clock.waits == waits


def test_a_wait_that_is_too_long_is_told(server, client, clock):
    server.replies(error("quota", 429, **{"Retry-After": "7200"}))
    with pytest.raises(ValueError, match=r"takes no request for 120 minutes \(HTTP 429, quota\)"):
        client.ask(HELLO)
    assert clock.waits == []


def test_a_server_that_stays_away_is_given_up(server, client, clock):
    server.replies(error("busy", 500))
    with pytest.raises(ValueError, match=f"did not answer in {ATTEMPTS} attempts: HTTP 500, busy"):
        client.ask(HELLO)
    assert len(server.questions) == ATTEMPTS
    assert max(clock.waits) <= LONGEST_WAIT < sum(clock.waits)


def test_an_answer_that_does_not_come_in_time_is_asked_again(server, clock):
    released = threading.Event()

    def respond(question):
        if len(server.questions) == 1:
            released.wait(10)
        return Reply("yes")

    server.respond = respond
    client = ChatClient(Endpoint(server.url, "eye-1", timeout=0.05), clock)
    try:
        assert client.ask(HELLO) == "yes"
    finally:
        released.set()
    assert len(server.questions) == 2


# Options that a server may not know


@pytest.mark.parametrize(
    "refusal",
    [
        error("Unsupported parameter: 'seed'"),
        Reply({"error": {"message": "Unknown", "param": "seed"}}, 400),
        Reply({"detail": [{"loc": ["body", "seed"], "msg": "extra"}]}, 422),
    ],
)
def test_a_server_without_seeds_is_asked_without(server, client, clock, refusal):
    server.replies(refusal, "yes")
    client.ask(HELLO)
    client.ask(HELLO)
    assert ["seed" in question.body for question in server.questions] == [True, False, False]
    assert sum(clock.waits) == 0


def test_max_tokens_has_two_names(server, client):
    words = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    server.replies(error(words), "yes")
    client.ask(HELLO)
    assert "max_tokens" not in server.questions[1].body
    assert server.questions[1].body["max_completion_tokens"] == 1024


def test_a_model_that_takes_no_temperature_is_told(server, client):
    server.replies(error("'temperature' does not support 0 with this model."))
    with pytest.raises(ValueError, match=r"eye-1 takes no temperature of 0 .*temperature=null"):
        client.ask(HELLO)

    own = ChatClient(Endpoint(server.url, "eye-1", temperature=None), QuickClock())
    server.replies("yes")
    own.ask(HELLO)
    assert "temperature" not in server.questions[-1].body


def test_a_prompt_that_speaks_of_temperature_is_no_option(server, client):
    server.replies(error("I will not look at: temperature of the seed"))
    with pytest.raises(NoAnswer, match="refuses the request: HTTP 400, I will not look at"):
        client.ask(HELLO)
    assert len(server.questions) == 1


# What is refused


REFUSALS = {
    "unknown model": (error("no model eye-1", 404), "no model eye-1 .HTTP 404.* give url=<"),
    "wrong key": (error("wrong key", 401), "does not let you in .*look at the key in JUDGE_KEY"),
    "forbidden": (error("no", 403), "does not let you in"),
    "teapot": (error("no", 418), "refuses requests: HTTP 418, no"),
}
NO_ANSWERS = {
    "a bad request": (error("bad\n\x1b[2Jimage"), r"HTTP 400, bad \\x1b\[2Jimage"),
    "too large": (error("large", 413), "the image is too large .* give image_side=<"),
    "a refusal": (
        Reply({"choices": [{"message": {"content": None, "refusal": "no people"}}]}),
        "the model refuses to answer: no people",
    ),
    "cut off": (
        Reply(answer('{"score": 1', finish_reason="length")),
        "cut off after 1024 tokens: give max_tokens=<more>",
    ),
    "filtered": (Reply(answer("", finish_reason="content_filter")), "content filter stopped"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_no_question_can_mend_is_refused_at_once(server, client, case):
    reply, words = REFUSALS[case]
    server.replies(reply)
    with pytest.raises(ValueError, match=words) as refused:
        client.ask(HELLO)
    assert not isinstance(refused.value, NoAnswer)
    assert len(server.questions) == 1 and "\n" not in str(refused.value)


@pytest.mark.parametrize("case", NO_ANSWERS)
def test_a_question_without_an_answer_says_so(server, client, case):
    reply, words = NO_ANSWERS[case]
    server.replies(reply)
    with pytest.raises(NoAnswer, match=words) as refused:
        client.ask(HELLO)
    assert len(server.questions) == 1 and "\n" not in str(refused.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(server, client, status):
    with chat_server() as other:
        location = {"Location": f"{other.url}/chat/completions"}
        server.replies(Reply(b"", status, location))
        with pytest.raises(ValueError, match=f"sends requests on to {other.url}.*not followed"):
            client.ask(HELLO)
        assert not other.questions


def test_a_server_that_is_not_there_is_told_at_once(clock):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = ChatClient(Endpoint(f"http://127.0.0.1:{port}/v1", "eye-1"), clock)
    words = rf"no server answers at 127.0.0.1:{port} \(ConnectionError\): give url=<"
    with pytest.raises(ValueError, match=words):
        client.ask(HELLO)
    assert clock.waits == []


def test_a_server_that_was_there_is_asked_again(client, monkeypatch):
    client.ask(HELLO)
    post = client._session.post
    lost = [requests.exceptions.ConnectionError("reset"), requests.exceptions.ChunkedEncodingError]

    def broken(*arguments, **options):
        if lost:
            raise lost.pop()
        return post(*arguments, **options)

    monkeypatch.setattr(client._session, "post", broken)
    assert client.ask(HELLO) == "yes"


def test_a_proxy_does_not_see_what_is_meant_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    server.replies("yes")
    assert ChatClient(Endpoint(server.url, "eye-1"), QuickClock()).ask(HELLO) == "yes"


# The key


def test_the_key_stands_in_no_message(server, client, caplog):
    caplog.set_level(logging.DEBUG)
    server.respond = lambda question: error(f"wrong: {question.headers['Authorization']}", 401)
    with pytest.raises(ValueError) as refused:
        client.ask(HELLO)
    assert KEY not in str(refused.value) and "Bearer ***" in str(refused.value)
    location = {"Location": f"http://elsewhere/?key={KEY}"}
    server.replies(Reply(b"", 302, location))
    with pytest.raises(ValueError) as refused:
        client.ask(HELLO)
    assert KEY not in str(refused.value)
    server.replies(Reply({"choices": [{"message": {"refusal": KEY}}]}))
    with pytest.raises(ValueError) as refused:
        client.ask(HELLO)
    assert KEY not in str(refused.value)
    assert KEY not in caplog.text and KEY not in repr(client.endpoint)


@pytest.mark.parametrize("key", ["two words", "sk-\nsecret", "sk-sécret", "sk-\x7f"])
def test_what_cannot_be_a_key_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    endpoint = Endpoint("https://host/v1", "m", api_key_variable="JUDGE_KEY")
    with pytest.raises(ValueError, match="the environment variable JUDGE_KEY holds no key") as it:
        ChatClient(endpoint)
    assert key not in str(it.value)


def test_a_key_that_is_not_set_is_asked_for(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", " \n")
    endpoint = Endpoint("https://host/v1", "m", api_key_variable="JUDGE_KEY")
    with pytest.raises(ValueError, match="type export JUDGE_KEY=<the key> first"):
        ChatClient(endpoint)


@pytest.mark.parametrize("key", [KEY, "d41d8cd98f00b204e9800998ecf8427e", "A" * 65, "KEY=1"])
def test_a_key_in_the_place_of_its_variable_is_refused_and_not_shown(key):
    with pytest.raises(ValueError, match="is the name of an environment variable") as refused:
        Endpoint("https://host/v1", "m", api_key_variable=key)
    assert key not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "localhost:8000"}, "url=localhost:8000 is no address of a server"),
        ({"url": "ftp://host/v1"}, "is no address of a server"),
        ({"url": "https://"}, "is no address of a server"),
        ({"url": "https://user:pass@host/v1"}, "url= holds a user, a password or a query"),
        ({"url": "https://host/v1?key=1"}, "url= holds a user, a password or a query"),
        ({"url": "http://host/v1"}, "url=http://host/v1 would send images and key without"),
        ({"url": "http://10.0.0.7/v1"}, "without encryption to another machine"),
        ({"url": "http://localhost.evil.org/v1"}, "without encryption to another machine"),
        ({"model": " "}, "model= is empty"),
        ({"in_flight": 0}, "in_flight=0 must be above 0"),
        ({"per_minute": -1.0}, "per_minute=-1 must be above 0"),
        ({"timeout": float("nan")}, "timeout=nan must be above 0"),
        ({"image_side": 0}, "image_side=0 must be above 0"),
        ({"temperature": -1.0}, "temperature=-1 must be at least 0"),
        ({"price_in": float("inf")}, "price_in=inf must be at least 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, words):
    with pytest.raises(ValueError, match=words) as refused:
        Endpoint(**({"url": "https://host/v1", "model": "m"} | settings))
    assert "pass" not in str(refused.value).partition("password")[0]
    assert "key=1" not in str(refused.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000"])
def test_this_machine_needs_no_tls(host):
    assert Endpoint(f"http://{host}/v1", "m").is_loopback
    assert not Endpoint("http://host/v1", "m", plain_http=True).is_loopback


# Pace, many at once, and what it costs


def test_requests_keep_their_distance(clock):
    pace = Pace(per_minute=30, clock=clock)
    starts = []
    for _ in range(4):
        pace.wait_for_turn()
        starts.append(clock.now())
    assert [start - starts[0] for start in starts] == pytest.approx([0, 2, 4, 6])


def test_processes_share_the_limits(server, clock):
    client = ChatClient(Endpoint(server.url, "m", in_flight=6, per_minute=60), clock)
    client.divide(3)
    assert client.in_flight == 2 and client._pace.gap == pytest.approx(3)
    client.divide(30)
    assert client.in_flight == 1


def test_so_many_are_asked_at_once_and_no_more(server, clock):
    """Each of three waits until three are there."""
    together = threading.Barrier(3, timeout=10)

    def respond(question):
        together.wait()
        return Reply("yes")

    server.respond = respond
    client = ChatClient(Endpoint(server.url, "m", in_flight=3), clock)
    client.for_each(lambda item: client.ask(HELLO), range(9))
    assert len(server.questions) == 9 and server.most_at_once == 3


def test_after_an_error_nothing_new_is_begun(server, clock):
    def respond(question):
        return error("no", 418) if len(server.questions) >= 4 else Reply("yes")

    server.respond = respond
    client = ChatClient(Endpoint(server.url, "m", in_flight=1), clock)
    kept = []

    def ask(item):
        client.ask(HELLO)
        kept.append(item)

    with pytest.raises(ValueError, match="HTTP 418"):
        client.for_each(ask, range(100))
    assert kept == [0, 1, 2] and len(server.questions) == 4

    # It can be used again
    server.replies("yes")
    client.for_each(ask, range(2))
    assert kept == [0, 1, 2, 0, 1]


def test_an_error_wakes_those_that_wait(server):
    """By the real clock: a thread that the server lets wait for ten minutes ends at once."""
    waiting = threading.Event()

    def respond(question):
        if len(server.questions) == 1:
            return error("slow", 500, **{"Retry-After": "600"})
        waiting.wait(10)
        return error("no", 418)

    server.respond = respond
    client = ChatClient(Endpoint(server.url, "m", in_flight=2))
    pause = client._pace.pause

    def noted_pause(seconds):
        waiting.set()
        pause(seconds)

    client._pace.pause = noted_pause
    start = time.monotonic()
    with pytest.raises(ValueError, match="HTTP 418"):
        client.for_each(lambda item: client.ask(HELLO), range(2))
    assert time.monotonic() - start < 10


def test_tokens_and_cost_are_counted(server, client):
    server.replies(error("busy", 500), "yes", "yes", Reply({"choices": answer("yes")["choices"]}))
    for _ in range(3):
        client.ask(HELLO)
    usage = client.usage
    assert (usage.answers, usage.repeats, usage.read, usage.written) == (3, 1, 200, 10)
    assert usage.cost(client.endpoint) == pytest.approx((200 * 2 + 10 * 10) / 1e6)
    assert usage.sentence(client.endpoint) == (
        "3 answers of eye-1, 1 requests repeated, 200 tokens read and 10 written, the server did "
        "not count those of 1 answers, cost 0.00"
    )
    without_price = Endpoint(server.url, "eye-1")
    assert usage.cost(without_price) is None and "cost" not in usage.sentence(without_price)
    assert usage.amount(without_price) == "210 tokens"
