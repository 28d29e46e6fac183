"""Fetching images: a resolver that is made up, and a server on loopback in the place of the internet."""

import io
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

from mpi_mlx.errors import ServingError
from mpi_mlx.serving.remote import RemoteImages, Unfetched, is_public, parse_host

PUBLIC, OTHER = "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"
PRIVATE = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::7f00:1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::1",
    "2001:0:53aa:64c:0:0:80ff:fffe", "100::1", "localhost", "",
]  # fmt: skip


def png():
    file = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        place = urlsplit(self.path)
        self.server.seen.append((self.headers["Host"], self.path))
        wanted = parse_qs(place.query)
        if place.path == "/to":
            self.send_response(302)
            self.send_header("Location", wanted["url"][0])
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif place.path == "/large":  # says so
            self.send_response(200)
            self.send_header("Content-Length", str(10**9))
            self.end_headers()
        elif place.path == "/endless":  # does not
            self.send_response(200)
            self.end_headers()
            self._pour(b"x" * 4096, 0)
        elif place.path == "/drip":
            self.send_response(200)
            self.end_headers()
            self._pour(b"x", 0.02)
        elif place.path == "/drip-header":
            self._pour(b"H", 0.02)
        elif place.path == "/silent":
            time.sleep(2)
        elif place.path == "/none":
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(png())))
            self.end_headers()
            self.wfile.write(png())

    def _pour(self, piece, pause):
        end = time.monotonic() + 5
        try:
            while time.monotonic() < end:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            self.close_connection = True


@pytest.fixture(scope="module")
def internet():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.seen = True, []
    server.handle_error = lambda *_: None  # clients that leave
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Handshaken(socket.socket):
    def do_handshake(self):
        pass


class NoTLS:
    """Certificates are the ssl module's affair: here, whose certificate is asked for."""

    def __init__(self):
        self.names = []

    def wrap_socket(self, stream, server_hostname, do_handshake_on_connect):
        self.names.append(server_hostname)
        seconds = stream.gettimeout()
        made = Handshaken(fileno=stream.detach())
        made.settimeout(seconds)
        return made


@pytest.fixture
def remote(internet):
    """Fetches from images.example and cdn.example; ``joined`` and ``asked`` tell what happened."""

    class Made:
        joined, asked, tls = [], [], NoTLS()
        names = {"images.example": [PUBLIC], "cdn.example": [OTHER]}

        def find(self, host, port):
            self.asked.append(host)
            found = self.names[host]
            return found.pop(0) if found and isinstance(found[0], list) else found

        def join(self, address, port, seconds):
            self.joined.append((address, port))
            return socket.create_connection(internet.server_address, timeout=seconds)

    made = Made()
    made.joined, made.asked = [], []
    made.names = dict(Made.names)
    internet.seen.clear()

    def images(*hosts, **options):
        hosts = hosts or (("images.example", None), ("cdn.example", None))
        return RemoteImages(frozenset(hosts), find=made.find, join=made.join, tls=made.tls, **options)

    made.images = images
    return made


def test_addresses_on_the_internet_and_not():
    assert [address for address in PRIVATE if is_public(address)] == []
    assert all(is_public(address) for address in (PUBLIC, OTHER, "8.8.8.8", "64:ff9b::5db8:d822"))


def test_an_image_comes_from_the_address_that_was_checked(remote, internet):
    assert remote.images().fetch("https://IMAGES.example./a b/ü.png?x=1&y=é") == png()
    assert remote.asked == ["images.example"] and remote.joined == [(PUBLIC, 443)]
    assert remote.tls.names[-1] == "images.example"
    assert internet.seen == [("images.example", "/a%20b/%C3%BC.png?x=1&y=%C3%A9")]
    assert remote.images().fetch("http://cdn.example/") == png()
    assert remote.joined[-1] == (OTHER, 80)
    real = RemoteImages(frozenset())
    assert real.tls.check_hostname and real.tls.verify_mode == ssl.CERT_REQUIRED


@pytest.mark.parametrize("address", PRIVATE)
def test_no_private_address_behind_a_name(remote, address):
    for found in ([address], [PUBLIC, address], []):
        remote.names["images.example"] = found
        with pytest.raises(Unfetched, match="not public"):
            remote.images().fetch("http://images.example/x.png")
    assert remote.joined == []


def test_a_name_that_changes_its_address_reaches_nothing(remote):
    remote.names["images.example"] = [[PUBLIC], ["127.0.0.1"], [PUBLIC]]
    assert remote.images().fetch("http://images.example/x.png") == png()  # one look, one connection
    assert remote.asked == ["images.example"] and remote.joined == [(PUBLIC, 80)]
    with pytest.raises(Unfetched, match="not public"):
        remote.images().fetch("http://images.example/x.png")
    assert len(remote.joined) == 1


def test_redirects_are_checked_again(remote):
    images = remote.images()
    assert images.fetch("http://images.example/to?url=/x.png") == png()
    assert images.fetch("http://images.example/to?url=https://cdn.example/x.png") == png()
    assert remote.joined[-2:] == [(PUBLIC, 80), (OTHER, 443)]
    for target, said in (
        ("http://127.0.0.1/x.png", "not allowed"),
        ("http://[::1]/x.png", "not allowed"),
        ("http://evil.example/x.png", "not allowed"),
        ("http://images.example:22/", "not allowed"),
        ("file:///etc/passwd", "http"),
        ("//user:word@cdn.example/", "password"),
        ("http://[", "no"),
        ("/to?url=/to", "redirects"),
    ):
        before = len(remote.joined)
        with pytest.raises(Unfetched, match=said):
            loop = "/to?url=/to%3Furl=/to%253Furl=/to%25253Furl=/x"
            images.fetch("http://images.example" + (loop if said == "redirects" else f"/to?url={target}"))
        assert len(remote.joined) - before == (4 if said == "redirects" else 1)
    remote.names["cdn.example"] = ["10.1.2.3"]
    with pytest.raises(Unfetched, match="cdn.example has an address that is not public"):
        images.fetch("http://images.example/to?url=http://cdn.example/x.png")
    remote.names["images.example"] = [[PUBLIC], ["127.0.0.1"]]  # the same name, the second time
    with pytest.raises(Unfetched, match="images.example has an address that is not public"):
        images.fetch("http://images.example/to?url=/x.png")
    remote.names["images.example"] = [PUBLIC]
    with pytest.raises(Unfetched, match="without encryption"):
        images.fetch("https://images.example/to?url=http://images.example/x.png")


def test_size_and_time_are_bounded(remote):
    small = remote.images(max_bytes=10_000)
    for path in ("/large", "/endless"):
        with pytest.raises(Unfetched, match="larger than 10,000 bytes"):
            small.fetch("http://images.example" + path)
    for scheme in ("http", "https"):
        for path in ("/drip", "/drip-header", "/silent"):
            begin = time.monotonic()
            with pytest.raises(Unfetched, match="too long"):
                remote.images(seconds=0.3).fetch(f"{scheme}://images.example{path}")
            assert time.monotonic() - begin < 1.9, path
    with pytest.raises(Unfetched, match="answered 404"):
        remote.images().fetch("http://images.example/none")


def test_a_resolver_that_hangs_or_fails(remote):
    done = threading.Event()

    def hang(host, port):
        done.wait(5)
        return [PUBLIC]

    def fail(*_):
        raise socket.gaierror("no such name")

    hosts = frozenset([("images.example", None)])
    with pytest.raises(Unfetched, match="too long"):
        RemoteImages(hosts, find=hang, join=remote.join, seconds=0.2).fetch("http://images.example/")
    done.set()
    with pytest.raises(Unfetched, match="not known"):
        RemoteImages(hosts, find=fail, join=remote.join).fetch("http://images.example/")
    with pytest.raises(Unfetched, match="cannot be reached"):
        RemoteImages(hosts, find=lambda *_: [PUBLIC], join=fail).fetch("http://images.example/")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://images.example/x", "//images.example/x", "http:/x", "http://", "http://[/", "http://images.example:x/",
        "http://evil.example/x", "http://images.example.evil.example/x", "http://images.example@evil.example/",
        "http://a:b@images.example/", "http://images.example:8080/", "http://ximages.example/",
        "http://evil.example\\@images.example/", "http://evil.example#@images.example/", "http://127.0.0.1/",
        "http://2130706433/", "http://0x7f.1/", "http://[::ffff:127.0.0.1]/", "http://images.example%00/",
    ],
)  # fmt: skip
def test_other_places_are_not_even_looked_up(remote, url):
    with pytest.raises(Unfetched):
        remote.images().fetch(url)
    assert remote.asked == [] and remote.joined == []


def test_headers_cannot_be_smuggled_into_the_request(remote, internet):
    assert remote.images().fetch("http://images.example/x\r\nX-Evil: 1\r\n\r\nGET /y") == png()
    assert len(internet.seen) == 1 and "\n" not in internet.seen[0][1]


def test_hosts_as_they_are_given():
    assert parse_host("Images.Example.") == ("images.example", None)
    assert parse_host("bücher.example:8443") == ("xn--bcher-kva.example", 8443)
    assert parse_host(PUBLIC) == (PUBLIC, None) and parse_host(f"[{OTHER}]:81") == (OTHER, 81)
    for text in ("", "*", "*.example", "https://images.example", "images.example/x", "a@b.example", "x:y",
                 "127.0.0.1", "[::1]", "10.0.0.8:80", "a b"):  # fmt: skip
        with pytest.raises(ServingError, match="--allow-image-host"):
            parse_host(text)


def test_a_port_that_was_named(remote):
    images = remote.images(("images.example", 8443))
    assert images.fetch("https://images.example:8443/x.png") == png()
    assert remote.joined == [(PUBLIC, 8443)]
    with pytest.raises(Unfetched, match="not allowed"):
        images.fetch("https://images.example/x.png")
