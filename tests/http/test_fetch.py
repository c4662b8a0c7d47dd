"""URLs in ``source``: what is fetched, from where, within which limits. A local web server stands for the Internet.

Its address is private, so tests that must reach it hand in a test of addresses that lets 127.0.0.1 through, and a resolver
that knows their names. Both are arguments of UrlFetcher and no settings: nobody can switch the check off.
"""

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import BadRequest
from deploy.api import create_api
from deploy.api.fetch import UrlFetcher, is_public, is_url, resolve
from deploy.api.problems import BadUrl
from deploy.settings import UrlLimits
from tests.conftest import picture
from tests.http.conftest import LIMITS, OneDetectorFleet

Answer = Callable[[str, asyncio.StreamWriter], object]


class Web:
    """A web server on 127.0.0.1 whose paths a test fills, and a resolver for its names.

    Attributes:
        paths: path → the bytes that are answered, head included, or a coroutine function that writes them.
        names: host → the answers of the name server, one for each time it is asked; the last one stays.
        seen: the heads of all requests.
        asked: the names that were resolved.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.paths: dict[str, object] = {}
        self.names: dict[str, list[list[str]]] = {"images.test": [["127.0.0.1"]]}
        self.seen: list[str] = []
        self.asked: list[str] = []

    def url(self, path: str, host: str = "images.test", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    async def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answers = self.names.get(host, [[]])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def fetcher(self, **limits: object) -> UrlFetcher:
        settings = UrlLimits.model_validate({"allow": True, "ports": (self.port,), "max_mb": 0.1, "timeout_s": 5} | limits)
        return UrlFetcher(settings, self.resolve, lambda address: address == "127.0.0.1" or is_public(address))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.seen.append(head)
            answer = self.paths.get(head.split()[1], ok(b"", status="404 Not Found"))
            if callable(answer):
                await answer(writer)
            else:
                writer.write(answer)  # type: ignore[arg-type]
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def ok(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(to: str, status: str = "302 Found") -> bytes:
    return ok(b"elsewhere", f"Location: {to}", status=status)


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Web]:
    web = Web(0)
    server = await asyncio.start_server(web.serve, "127.0.0.1", 0, ssl=tls)
    web.port = server.sockets[0].getsockname()[1]
    try:
        yield web
    finally:
        server.close()


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    async with serving() as made:
        yield made


async def refusal(fetcher: UrlFetcher, url: str) -> str:
    with pytest.raises(BadUrl) as caught:
        await fetcher.fetch(url)
    return caught.value.message


# what is an address of the Internet

# fmt: off
PRIVATE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.1.2.3", "168.63.129.16",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.0.192", "192.0.2.1", "192.88.99.1",
    "192.168.0.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1",
    "255.255.255.255", "::", "::1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::10.0.0.1", "::8.8.8.8", "64:ff9b::10.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::8.8.8.8", "100::1", "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:10::1", "2001:db8::1", "2002:0a00:0001::", "2002:0808:0808::1", "3fff::1",
    "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "2606:4700::1111%eth0", "fec0::1", "ff02::1",
    "ff0e::1",
]
# fmt: on
# fmt: off
PUBLIC = [
    "8.8.8.8", "1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111", "2a00:1450:4001::1", "2001:4860:4860::8888",
    "64:ff9b::8.8.8.8",
]
# fmt: on


def test_addresses_of_the_internet_and_all_others() -> None:
    assert [address for address in PRIVATE if is_public(address)] == []
    assert [address for address in PUBLIC if not is_public(address)] == []


@pytest.mark.parametrize(
    "text", ["", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "8.8.8.8/8", " 8.8.8.8", "[::1]"]
)
def test_what_is_not_an_address_is_not_public(text: str) -> None:
    assert not is_public(text)


@given(st.ip_addresses(v=4))
def test_a_v4_address_is_as_public_in_nat64_and_never_in_any_other_disguise(address: IPv4Address) -> None:
    public = is_public(str(address))
    assert not (public and (address.is_private or address.is_multicast or address.is_reserved or address.is_link_local))
    number = int(address)
    assert is_public(str(IPv6Address((0x64FF9B << 96) | number))) is public
    for disguise in (
        0xFFFF << 32 | number,  # mapped
        number,  # compatible
        0x2002 << 112 | number << 80,  # 6to4
        0x20010000 << 96 | number << 64,  # Teredo's server
        0x20010000 << 96 | (number ^ 0xFFFFFFFF),  # Teredo's client
        0x64FF9B0001 << 80 | number,  # a network's own NAT64
    ):
        assert not is_public(str(IPv6Address(disguise)))


@given(st.ip_addresses(v=6) | st.ip_addresses(v=6, network="2000::/3") | st.ip_addresses(v=6, network="2001::/16"))
def test_a_public_v6_address_is_global_unicast(address: IPv6Address) -> None:
    if is_public(str(address)):
        assert address.is_global and not address.is_multicast and not address.is_private
        assert address in IPv6Network("2000::/3") or address in IPv6Network("64:ff9b::/96")
        assert address.teredo is None and address.sixtofour is None and address.ipv4_mapped is None


@given(st.text(max_size=60) | st.ip_addresses().map(str))
def test_is_public_reads_whatever_it_gets(text: str) -> None:
    assert is_public(text) in (True, False)
    if is_public(text):
        ip_address(text)


# where connections go

INSIDE = [
    "http://127.0.0.1:PORT/a.png",
    "http://127.1:PORT/a.png",
    "http://2130706433:PORT/a.png",
    "http://0x7f000001:PORT/a.png",
    "http://0177.0.0.1:PORT/a.png",
    "http://0x7f.1:PORT/a.png",
    "http://0:PORT/a.png",
    "http://[::1]:PORT/a.png",
    "http://[::ffff:127.0.0.1]:PORT/a.png",
    "http://[::ffff:7f00:1]:PORT/a.png",
    "http://localhost:PORT/a.png",
    "http://localhost.:PORT/a.png",
    "http://LOCALHOST:PORT/a.png",
    "http://ⓛocalhost:PORT/a.png",
    "http://127。0。0。1:PORT/a.png",
    "http://127.0.0.1%00.images.test:PORT/a.png",
    "http://169.254.169.254:PORT/latest/meta-data/",
    "http://[fe80::1%25eth0]:PORT/a.png",
    "http:\\\\127.0.0.1:PORT\\a.png",
    "http://8.8.8.8:PORT\\@127.0.0.1:PORT/a.png",
    "http://127.0.0.1:PORT#@8.8.8.8:PORT/a.png",
    "http://127.0.0.1:PORT?@8.8.8.8:PORT/a.png",
    "http:///a.png",
    "http://",
    "//127.0.0.1:PORT/a.png",
    "http:/127.0.0.1:PORT/a.png",
    "http://user@127.0.0.1:PORT/a.png",
    "http://8.8.8.8@127.0.0.1:PORT/a.png",
    "http://8.8.8.8:80@127.0.0.1:PORT/a.png",
    "http://images.test:PORT @127.0.0.1:PORT/a.png",
    "http://127.0.0.1:PORT\t/a.png",
    "HTTP://127.0.0.1:PORT/a.png",
]


@pytest.mark.parametrize("url", INSIDE)
async def test_no_spelling_reaches_this_machine(web: Web, url: str) -> None:
    """With the system's own resolver and the test of addresses that everybody gets."""
    web.paths["/a.png"] = ok(picture())
    fetcher = UrlFetcher(UrlLimits(allow=True, ports=(web.port, 80), timeout_s=2))
    await refusal(fetcher, url.replace("PORT", str(web.port)))
    assert web.seen == []


async def test_the_systems_resolver_reads_odd_spellings_and_knows_no_nonsense() -> None:
    """So the test above is about addresses, not about names that nobody knows."""
    for spelling in ("127.1", "2130706433", "0x7f000001", "0177.0.0.1"):
        assert await resolve(spelling, 80) == ["127.0.0.1"]
    for nonsense in ("", "a" * 64, "a..b", "nowhere.invalid"):
        assert all(not is_public(address) for address in await resolve(nonsense, 80))


async def test_a_name_of_which_one_address_is_private_is_refused(web: Web) -> None:
    web.paths["/a.png"] = ok(picture())
    web.names["mixed.test"] = [["127.0.0.1", "10.0.0.1"]]
    message = await refusal(web.fetcher(), web.url("/a.png", "mixed.test"))
    assert message == await refusal(web.fetcher(), web.url("/a.png", "unknown.test"))  # tells nothing about inside names
    assert web.seen == []


async def test_a_name_is_resolved_once_and_the_connection_goes_to_the_checked_address(web: Web) -> None:
    """DNS rebinding: the second answer would be an address inside."""
    web.paths["/a.png"] = ok(picture())
    web.names["rebind.test"] = [["127.0.0.1"], ["10.0.0.1"]]
    assert await web.fetcher().fetch(web.url("/a.png", "rebind.test")) == picture()
    assert web.asked == ["rebind.test"]
    assert f"host: rebind.test:{web.port}" in web.seen[0].lower()
    assert "public address" in await refusal(web.fetcher(), web.url("/a.png", "rebind.test"))  # asked a second time
    assert len(web.seen) == 1


async def test_the_systems_name_server_is_not_asked_behind_the_checks_back(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = socket.getaddrinfo

    def spy(host: str, *rest: Any, **options: Any) -> object:
        asked.append(host)
        return plain(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", spy)
    web.paths["/a.png"] = ok(picture())
    assert await web.fetcher().fetch(web.url("/a.png")) == picture()
    assert set(asked) <= {"127.0.0.1"}


async def test_the_next_address_is_tried_where_the_first_takes_no_connection(web: Web) -> None:
    web.paths["/a.png"] = ok(picture())
    web.names["two.test"] = [["127.0.0.2", "127.0.0.1"]]
    fetcher = UrlFetcher(UrlLimits(allow=True, ports=(web.port,)), web.resolve, lambda address: True)
    assert await fetcher.fetch(web.url("/a.png", "two.test")) == picture()


async def test_proxies_of_the_environment_are_not_used(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    web.paths["/a.png"] = ok(picture())
    assert await web.fetcher().fetch(web.url("/a.png")) == picture()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("ftp://images.test/a.png", "Only http"),
        ("file:///etc/passwd", "Only http"),
        ("file://images.test/etc/passwd", "Only http"),
        ("gopher://images.test/", "Only http"),
        ("s3://bucket/a.png", "Only http"),
        ("javascript:alert(1)", "Only http"),
        ("http://me:secret@images.test/a.png", "password"),
        ("http://me@images.test/a.png", "password"),
        ("http://images.test:22/a.png", "ports 80, 443"),
        ("https://images.test:8443/a.png", "ports 80, 443"),
        ("http://images.test:99999/a.png", "ports 80, 443"),
        ("//images.test/a.png", "Only http"),
        ("images.test/a.png", "Only http"),
        ("http:///a.png", "no host"),
        ("http://[::1/a.png", "not a URL"),
        ("http://a\nb/a.png", "not a URL"),
        ("http://" + "a" * 70_000, "not a URL"),
    ],
)
async def test_only_plain_http_urls_are_read(url: str, sentence: str) -> None:
    web = Web(0)
    message = await refusal(web.fetcher(ports=(80, 443)), url)
    assert sentence in message and "secret" not in message
    assert web.asked == []


NOWHERE = Web(0).fetcher(ports=(80,))


@given(st.text(max_size=60).map("http://".__add__) | st.text(max_size=60))
def test_no_text_is_more_than_refused(text: str) -> None:
    with pytest.raises(BadUrl):
        asyncio.run(NOWHERE.fetch(text))


# redirects


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"]
)
async def test_redirects_are_followed(web: Web, status: str) -> None:
    web.names["other.test"] = [["127.0.0.1"]]
    web.paths |= {
        "/1": redirect("/2?x=1", status),
        "/2?x=1": redirect(web.url("/3", "other.test"), status),
        "/3": ok(picture()),
    }
    assert await web.fetcher().fetch(web.url("/1")) == picture()
    assert web.asked == ["images.test", "images.test", "other.test"]


async def test_three_redirects_at_most(web: Web) -> None:
    web.paths |= {f"/{number}": redirect(f"/{number + 1}") for number in range(9)}
    web.paths["/4"] = web.paths["/loop"] = redirect("/loop")
    assert "more than 3 times" in await refusal(web.fetcher(), web.url("/0"))
    assert "more than 3 times" in await refusal(web.fetcher(), web.url("/loop"))
    web.paths["/3"] = ok(picture())
    assert await web.fetcher().fetch(web.url("/0")) == picture()


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("http://10.0.0.1:PORT/", "public address"),
        ("http://169.254.169.254:PORT/latest/meta-data/", "public address"),
        ("http://[::ffff:127.0.0.1]:PORT/secret", "public address"),
        ("//inside.test:PORT/secret", "public address"),
        ("http://127.0.0.1:1/secret", "ports"),
        ("http://me:pw@images.test:PORT/secret", "password"),
        ("//me:pw@images.test:PORT/secret", "password"),
        ("file:///etc/passwd", "Only http"),
        ("ftp://images.test/secret", "Only http"),
        ("http://[/", "ports"),  # httpx reads a host '%5b', which is then resolved and checked like any other
        ("http://[::1:80/", "not a URL"),
    ],
)
async def test_a_redirect_goes_nowhere_that_a_url_could_not(web: Web, target: str, sentence: str) -> None:
    web.names |= {"inside.test": [["10.0.0.1"]], "10.0.0.1": [["10.0.0.1"]], "169.254.169.254": [["169.254.169.254"]]}
    web.names |= {"::ffff:127.0.0.1": [["::ffff:127.0.0.1"]], "127.0.0.1": [["127.0.0.1"]]}
    web.paths |= {"/a": redirect(target.replace("PORT", str(web.port))), "/secret": ok(b"secret")}
    message = await refusal(web.fetcher(), web.url("/a"))
    assert sentence in message
    assert len(web.seen) == 1


async def test_nothing_of_the_first_host_is_sent_to_the_next(web: Web) -> None:
    web.names["other.test"] = [["127.0.0.1"]]
    web.paths |= {
        "/1": ok(b"", f"Location: {web.url('/2', 'other.test')}", "Set-Cookie: a=b", status="302 Found"),
        "/2": ok(b"x"),
    }
    await web.fetcher().fetch(web.url("/1"))
    sent = web.seen[1].lower()
    assert f"host: other.test:{web.port}" in sent
    assert not [name for name in ("cookie", "referer", "authorization", "images.test") if name in sent]


# what an answer may cost


async def drip(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def drip_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(1000):
        writer.write(f"X-{number}: a\r\n".encode())
        await writer.drain()
        await asyncio.sleep(0.05)


async def silence(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def drip_redirects(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.2)
    writer.write(redirect("/again"))


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        await writer.drain()


@pytest.mark.parametrize("answer", [drip, drip_head, silence, drip_redirects])
async def test_the_whole_takes_no_longer_than_the_limit(web: Web, answer: Answer) -> None:
    web.paths |= {"/a": answer, "/again": answer}
    started = time.monotonic()
    assert "within 0.5 s" in await refusal(web.fetcher(timeout_s=0.5, max_redirects=10), web.url("/a"))
    assert time.monotonic() - started < 5  # not the minute that these answers take


async def test_an_answer_larger_than_the_limit_is_cut_off(web: Web) -> None:
    web.paths |= {
        "/declared": b"HTTP/1.1 200 OK\r\nContent-Length: 100001\r\n\r\n",  # refused before anything comes
        "/endless": endless,
        "/unknown": b"HTTP/1.0 200 OK\r\n\r\n" + bytes(100_001),
        "/fits": ok(bytes(100_000)),
    }
    for path in ("/declared", "/endless", "/unknown"):
        assert "exceeds 0.1 MB" in await refusal(web.fetcher(), web.url(path))
    assert await web.fetcher().fetch(web.url("/fits")) == bytes(100_000)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (ok(b"no", status="404 Not Found"), "status 404"),
        (ok(b"no", status="500 Oops"), "status 500"),
        (ok(b"", status="204 No Content"), "status 204"),
        (ok(b"", status="302 Found"), "status 302"),
        (ok(b"x", "Content-Encoding: gzip"), "compressed"),
        (b"hello", "web server"),
        (b"", "web server"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", "web server"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000, "web server"),
    ],
)
async def test_an_answer_that_is_no_file_is_refused(web: Web, answer: bytes, sentence: str) -> None:
    web.paths["/a"] = answer
    assert sentence in await refusal(web.fetcher(), web.url("/a"))


async def test_a_host_that_takes_no_connection(web: Web) -> None:
    port = web.port
    web.port = 1
    assert "takes no connection" in await refusal(web.fetcher(), web.url("/a"))
    web.port = port


# https


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for images.test, and its key, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    subject = ["-subj", "/CN=images.test", "-addext", "subjectAltName=DNS:images.test"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files], check=True)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return both


async def test_https_is_verified_against_the_name_though_the_connection_goes_to_an_address(certificate: Path) -> None:
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate)
    names: list[str | None] = []
    server_side.sni_callback = lambda socket, name, context: names.append(name)
    async with serving(server_side) as web:
        web.paths["/a.png"] = ok(picture())
        web.names |= {"wrong.test": [["127.0.0.1"]], "images.test.": [["127.0.0.1"]]}
        strict, trusting = web.fetcher(), web.fetcher()
        trusting._tls.load_verify_locations(certificate)
        assert "certificate" in await refusal(strict, web.url("/a.png", scheme="https"))  # signed by nobody known
        assert "certificate" in await refusal(trusting, web.url("/a.png", "wrong.test", "https"))
        for host in ("images.test", "images.test."):
            assert await trusting.fetch(web.url("/a.png", host, "https")) == picture()
        assert set(names) == {"images.test", "wrong.test"}


# the way from a request


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("http://a/b", True),
        ("HTTPS://a/b", True),
        ("file:///etc/passwd", True),
        ("C:\\images\\a.jpg", True),
        (" http://a", True),
        ("data:image/png;base64,aGk=", False),
        ("DATA:image/png;base64,aGk=", False),
        ("aGVsbG8=", False),
        ("/etc/passwd", False),
        ("", False),
    ],
)
def test_what_counts_as_a_url(source: str, expected: bool) -> None:
    assert is_url(source) is expected


async def test_urls_are_off_by_default(web: Web) -> None:
    assert UrlLimits().allow is False
    with pytest.raises(BadRequest, match="not fetched"):
        await UrlFetcher(UrlLimits(), web.resolve, lambda address: True).fetch(web.url("/a.png"))
    assert web.asked == [] and web.seen == []


async def test_predict_answers_for_a_url_as_for_the_file(fleet: OneDetectorFleet, web: Web, api: FastAPI) -> None:
    app = create_api(fleet, LIMITS)
    app.state.urls = web.fetcher()
    web.paths |= {"/a.png": ok(picture(blue=2)), "/page": ok(b"<html>")}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fleet") as client:
        fetched = await client.post("/predict", data={"source": web.url("/a.png")})
        sent = await client.post("/predict", files={"file": picture(blue=2)})
        assert fetched.json()["images"][0]["results"] == sent.json()["images"][0]["results"] != []
        page = await client.post("/predict", data={"source": web.url("/page")})
        assert (page.status_code, page.json()["error"]["code"]) == (400, "bad_image") and "html" not in page.text
        gone = await client.post("/predict", data={"source": web.url("/gone")})
        assert (gone.status_code, gone.json()["error"]["code"]) == (422, "bad_url")


async def test_roboflows_urls_are_fetched_side_by_side_within_the_requests_time(fleet: OneDetectorFleet, web: Web) -> None:
    app = create_api(fleet, LIMITS)
    app.state.urls = web.fetcher()
    both, never = asyncio.Barrier(2), asyncio.Event()

    async def together(writer: asyncio.StreamWriter) -> None:
        await both.wait()
        writer.write(ok(picture(blue=2)))

    async def silent(writer: asyncio.StreamWriter) -> None:
        await never.wait()

    web.paths |= {"/together": together, "/silent": silent}
    path, short = "/infer/object_detection", {"x-request-timeout-ms": "200"}

    def body(path: str) -> dict[str, Any]:
        return {"model_id": "fake/1", "image": [{"type": "url", "value": web.url(path)}] * 2}

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fleet") as client:
        assert len((await client.post(path, json=body("/together"))).json()) == 2
        for late in (
            await client.post(path, json=body("/silent"), headers=short),
            await client.post("/fake/1", params={"image": web.url("/silent")}, headers=short),
        ):
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    never.set()


async def test_roboflows_images_may_be_urls(fleet: OneDetectorFleet, web: Web) -> None:
    app = create_api(fleet, LIMITS)
    web.paths["/a.png"] = ok(picture(blue=2))
    body = {"model_id": "fake/1", "image": {"type": "url", "value": web.url("/a.png")}}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fleet") as client:
        refused = await client.post("/infer/object_detection", json=body)
        assert refused.status_code == 422 and "not fetched" in refused.json()["message"] and web.seen == []
        app.state.urls = web.fetcher()
        for answer in (
            await client.post("/infer/object_detection", json=body),
            await client.post("/fake/1", params={"image": web.url("/a.png")}),
        ):
            assert [found["class"] for found in answer.json()["predictions"]] == ["two"]
