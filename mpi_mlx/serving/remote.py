"""Images from hosts that the server's owner named, and from nowhere else.

A name is resolved once; every address behind it must be public; the connection goes to the address that was
checked, so that a name server which changes its mind reaches nothing. A redirect begins all over.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from mpi_mlx.errors import ServingError

DEFAULT_PORTS = {"https": 443, "http": 80}
REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in the last 32 bits
_UNICAST = ipaddress.ip_network("2000::/3")  # RFC 4291: global unicast
_lookups = ThreadPoolExecutor(4, "mpi-mlx-names")


class Unfetched(ServingError):
    """An image that is not fetched, or cannot be."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to a host on the internet: not private, loopback, link-local, reserved,
    multicast, or such an IPv4 address wrapped in an IPv6 one."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 6:
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip not in _UNICAST or ip.sixtofour is not None or ip.teredo is not None:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_link_local or ip.is_private)


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, as the system knows them. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(address: str, port: int, seconds: float) -> socket.socket:
    """A connection to an address, never to a name. Raises OSError."""
    return socket.create_connection((str(ipaddress.ip_address(address)), port), timeout=seconds)


def parse_host(text: str) -> tuple[str, int | None]:
    """``HOST`` or ``HOST:PORT`` as a pair; without a port, the scheme's own is meant.

    Raises:
        ServingError: it is a URL or a pattern, or an address that is not public.
    """
    text = text.strip()
    try:
        parts = urlsplit("//" + text)
        host, port = _plain(parts.hostname or ""), parts.port
    except ValueError:
        host, port = "", None
    if not host or "@" in text or any(mark in text for mark in "/?#*\\ "):
        raise ServingError(f"--allow-image-host {text}: give a host such as example.com, or example.com:8443")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host, port
    if not is_public(host):
        raise ServingError(f"--allow-image-host {text}: images are fetched from public addresses only")
    return host, port


def _plain(host: str) -> str:
    """A host in one spelling. Raises ValueError."""
    host = host.lower().rstrip(".")
    return host if host.isascii() else host.encode("idna").decode("ascii")


@dataclass(frozen=True)
class RemoteImages:
    """Fetches images from the hosts that were named.

    Args:
        hosts: (host, port or None) as :func:`parse_host` gives them.
        max_bytes: of an image. seconds: for all the images of a request. redirects: followed for an image.
        find, join, tls: name resolution, connection and certificates, to be replaced in tests.
    """

    hosts: frozenset[tuple[str, int | None]]
    max_bytes: int = 16 << 20
    seconds: float = 10.0
    redirects: int = 3
    find: Callable[[str, int], Sequence[str]] = resolve
    join: Callable[[str, int, float], socket.socket] = connect
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    def fetch(self, url: str, until: float | None = None) -> bytes:
        """What ``url`` gives, by ``until`` (of time.monotonic()).

        Raises:
            Unfetched: it is not allowed, too large, too slow, or does not come.
        """
        until = time.monotonic() + self.seconds if until is None else until
        for _ in range(self.redirects + 1):
            place = self._place(url)
            status, target, body = self._get(place, until)
            if target is None:
                if status != 200:
                    raise Unfetched(f"{place.hostname} answered {status}")
                return body
            try:
                following = urljoin(url, target)
            except ValueError:
                raise Unfetched(f"{place.hostname} redirects to no URL") from None
            if place.scheme == "https" and not following.lower().startswith("https:"):
                raise Unfetched(f"{place.hostname} redirects to an address without encryption")
            url = following
        raise Unfetched(f"more than {self.redirects} redirects")

    def _place(self, url: str) -> SplitResult:
        """The parts of a URL, where it is allowed."""
        try:
            place = urlsplit(url)
            host, port = _plain(place.hostname or ""), place.port
        except ValueError:
            raise Unfetched("not a URL") from None
        default = DEFAULT_PORTS.get(place.scheme)
        if default is None or place.username is not None or place.password is not None:
            raise Unfetched("an image's URL is http(s)://host/path, without a password")
        named = (host, port or default) in self.hosts
        if not (named or ((host, None) in self.hosts and port in (None, default))):
            raise Unfetched(f"images from {host[:100] or 'nowhere'} are not allowed here")
        netloc = f"[{host}]" if ":" in host else host
        return place._replace(netloc=netloc if port in (None, default) else f"{netloc}:{port}")

    def _addresses(self, place: SplitResult, until: float) -> list[str]:
        port = place.port or DEFAULT_PORTS[place.scheme]
        try:
            found = list(_lookups.submit(self.find, place.hostname, port).result(_left(until)))
        except TimeoutError:
            raise Unfetched(f"{place.hostname}: it took too long") from None
        except (OSError, UnicodeError):
            raise Unfetched(f"{place.hostname} is not known") from None
        if not found or not all(is_public(address) for address in found):
            raise Unfetched(f"{place.hostname} has an address that is not public")
        return found

    def _get(self, place: SplitResult, until: float) -> tuple[int, str | None, bytes]:
        """(status, target of a redirect or None, body)."""
        stream = self._open(place, until)
        # timeouts are of single reads, so a slow sender needs an end of its own
        watch = threading.Timer(_left(until), lambda: _shut(stream))
        watch.daemon = True
        watch.start()
        try:
            if place.scheme == "https":
                stream = self.tls.wrap_socket(
                    stream, server_hostname=place.hostname, do_handshake_on_connect=False
                )
                stream.do_handshake()
            connection = http.client.HTTPConnection(place.hostname or "", DEFAULT_PORTS[place.scheme])
            connection.auto_open, connection.sock = 0, stream  # it never connects by itself
            path = quote(place.path or "/", safe="/%:@!$&'()*+,;=~-._")
            query = "?" + quote(place.query, safe="/%:@!$&'()*+,;=~-._?") if place.query else ""
            headers = {"Host": place.netloc, "User-Agent": "mpi-mlx", "Accept": "image/*", "Connection": "close"}
            connection.request("GET", path + query, headers=headers | {"Accept-Encoding": "identity"})
            answer = connection.getresponse()
            if answer.status in REDIRECTS and (target := answer.headers.get("Location")):
                return answer.status, target, b""
            body = self._body(answer, place) if answer.status == 200 else b""
            if time.monotonic() >= until:
                raise Unfetched(f"{place.hostname}: it took too long")
            return answer.status, None, body
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = time.monotonic() >= until
            said = "it took too long" if late else f"the image did not come ({type(error).__name__})"
            raise Unfetched(f"{place.hostname}: {said}") from None
        finally:
            watch.cancel()
            stream.close()

    def _open(self, place: SplitResult, until: float) -> socket.socket:
        port = place.port or DEFAULT_PORTS[place.scheme]
        for address in self._addresses(place, until)[:4]:
            try:
                return self.join(address, port, min(_left(until), 5.0))
            except OSError:
                continue
        raise Unfetched(f"{place.hostname} cannot be reached")

    def _body(self, answer: http.client.HTTPResponse, place: SplitResult) -> bytes:
        body = b"" if (answer.length or 0) > self.max_bytes else answer.read(self.max_bytes + 1)
        if len(body) > self.max_bytes or (answer.length or 0) > self.max_bytes:
            raise Unfetched(f"the image of {place.hostname} is larger than {self.max_bytes:,} bytes")
        return body


def _left(until: float) -> float:
    return max(0.001, until - time.monotonic())


def _shut(stream: socket.socket) -> None:
    try:
        socket.socket.shutdown(stream, socket.SHUT_RDWR)
    except OSError:
        pass
