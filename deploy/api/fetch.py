"""URL of an image → its bytes, from public addresses only. Off unless ``UrlLimits.allow`` is set.

    URL ─ http(s)? no user? port? ─ resolve, once ─ every address public? ─ connect to that one ─ stream within limits → bytes
     ↑        └──────────────────────────┴────────────────┴──────────────────────┴─────────────────────┴──→ BadUrl
     └── a redirect's target: the same way again, ``max_redirects`` times at most

The connection goes to the very address that was checked, with the URL's name as Host and in TLS. So a name server that answers
differently the second time is never asked a second time (DNS rebinding). Each hop has a connection of its own: in a shared
pool, one address would stand for every name that was verified on it. httpx's transport is used without its client, which has
proxies, cookies and redirects of its own.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import httpx
from fastapi import Request

from actors.errors import BadRequest
from deploy.api.problems import BadUrl
from deploy.settings import UrlLimits

Address = IPv4Address | IPv6Address

REDIRECTS = frozenset({301, 302, 303, 307, 308})

# Which addresses Python calls global differs between its versions; these are refused by all of them.
_NOT_PUBLIC_V4 = tuple(
    IPv4Network(network)
    for network in (
        "100.64.0.0/10",  # shared by a provider's customers; Alibaba's metadata
        "168.63.129.16/32",  # Azure's metadata
        "192.0.0.0/24",  # IETF; Oracle's metadata
        "192.88.99.0/24",  # 6to4 relays
        "198.18.0.0/15",  # benchmarks
    )
)
_PUBLIC_V6 = IPv6Network("2000::/3")  # all that is handed out as global unicast
_NOT_PUBLIC_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # IETF; Teredo, which embeds IPv4 addresses
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which embeds IPv4 addresses
        "3fff::/20",  # documentation
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")  # an IPv4 address in the last 32 bits


async def fetch_image(request: Request, url: str) -> bytes:
    """Fetch the image that ``url`` names; every dialect fetches through this.

    Raises:
        BadRequest: URLs are not fetched here.
        BadUrl: this one is not, or it gave no answer within the limits.
    """
    fetcher: UrlFetcher = request.app.state.urls
    return await fetcher.fetch(url)


def is_url(source: str) -> bool:
    """Whether ``source`` names a place, of whatever scheme, rather than being the image itself."""
    scheme, colon, _ = source[:32].partition(":")
    return bool(colon) and scheme.lower() != "data"


def is_public(address: str) -> bool:
    """Whether anybody on the Internet could reach this address: the one test of where connections may go.

    Args:
        address: as name resolution gives it, or as it stands in a URL. What cannot be read is not public.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv4Address):
        return _is_public_v4(parsed)
    if parsed.scope_id is not None:
        return False
    if parsed in _NAT64:
        return _is_public_v4(IPv4Address(int(parsed) & 0xFFFFFFFF))
    special = any(parsed in network for network in _NOT_PUBLIC_V6)
    return parsed in _PUBLIC_V6 and parsed.is_global and not special


def _is_public_v4(address: IPv4Address) -> bool:
    special = address.is_multicast or address.is_reserved or any(address in network for network in _NOT_PUBLIC_V4)
    return address.is_global and not special


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of ``host``, as the system knows them; none if it knows none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class UrlFetcher:
    """Fetches images from public addresses within limits.

    Args:
        limits: which URLs, and what one may cost.
        resolve: host and port → addresses; asked once for each hop.
        allows: whether connections may go to an address.
    """

    def __init__(
        self,
        limits: UrlLimits,
        resolve: Callable[[str, int], Awaitable[list[str]]] = resolve,
        allows: Callable[[str], bool] = is_public,
    ) -> None:
        self._limits, self._resolve, self._allows = limits, resolve, allows
        self._tls = httpx.create_ssl_context(trust_env=False)

    async def fetch(self, url: str) -> bytes:
        """The bytes behind ``url``. Nothing about them is checked but their number.

        Raises:
            BadRequest: URLs are not fetched here.
            BadUrl: the URL, where it leads, or what it answered is refused.
        """
        if not self._limits.allow:
            raise BadRequest("URLs are not fetched: send the image itself, as a file or as base64")
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await self._follow(_parse(url))
        except TimeoutError:
            raise BadUrl(f"The URL did not give the whole image within {self._limits.timeout_s:g} s") from None

    async def _follow(self, url: httpx.URL) -> bytes:
        for _ in range(self._limits.max_redirects + 1):
            answer = await self._hop(url)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise BadUrl(f"The URL redirects more than {self._limits.max_redirects} times: give its final address")

    async def _hop(self, url: httpx.URL) -> bytes | httpx.URL:
        """What one URL answers: the image, or where it redirects to."""
        addresses = await self._addresses(url)
        for address in addresses:
            try:
                return await self._request(url, address)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue  # the same host's next address, checked alike
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise BadUrl("The URL's host did not answer as a web server does") from error
        raise BadUrl("The URL's host takes no connection, or its certificate is not valid")

    async def _addresses(self, url: httpx.URL) -> list[str]:
        if url.userinfo:
            raise BadUrl("URLs with a user or a password are not fetched")
        port = url.port or (443 if url.scheme == "https" else 80)
        if port not in self._limits.ports:
            raise BadUrl(f"URLs are fetched from ports {', '.join(map(str, self._limits.ports))} only")
        addresses = await self._resolve(url.raw_host.decode("ascii"), port)
        if not addresses or not all(self._allows(address) for address in addresses):  # one sentence: which names exist is no
            raise BadUrl("The URL's host has no public address")  # concern of whoever asks
        return addresses

    async def _request(self, url: httpx.URL, address: str) -> bytes | httpx.URL:
        headers = {"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity", "User-Agent": "yolofleet"}
        most = self._limits.timeout_s  # of each wait; what all of them may take together is limited in ``fetch``
        extensions = {
            "sni_hostname": url.raw_host.decode("ascii").rstrip("."),
            "timeout": {"connect": most / 3, "read": most, "write": most, "pool": most},
        }
        request = httpx.Request("GET", url.copy_with(host=address), headers=headers, extensions=extensions)
        async with httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False) as transport:
            response = await transport.handle_async_request(request)
            try:
                if response.status_code in REDIRECTS and "location" in response.headers:
                    return _parse(response.headers["location"], url)
                return await self._body(response)
            finally:
                await response.aclose()

    async def _body(self, response: httpx.Response) -> bytes:
        if response.status_code != httpx.codes.OK:
            raise BadUrl(f"The URL answered with status {response.status_code}")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise BadUrl("The URL answered compressed, although that was not asked for: send the image itself")
        most = int(self._limits.max_mb * 1e6)
        too_large = BadUrl(f"The image behind the URL exceeds {self._limits.max_mb:g} MB")
        declared = response.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise too_large
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > most:
                raise too_large
        return bytes(body)


def _parse(url: str, base: httpx.URL | None = None) -> httpx.URL:
    """The one reading of a URL: what it says is checked, and what it says is fetched."""
    try:
        parsed = httpx.URL(url.strip()) if base is None else base.join(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise BadUrl("This is not a URL that can be read") from error
    if parsed.scheme not in ("http", "https"):
        raise BadUrl("Only http and https URLs are fetched")
    if not parsed.host:
        raise BadUrl("The URL names no host")
    return parsed
