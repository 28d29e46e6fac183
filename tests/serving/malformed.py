"""Malformed requests, one for every number: fuzzed JSON, images, sizes and headers."""

import base64
import copy
import io
import json
import random

from PIL import Image

SEED, MOST = 20240, 6  # MOST: tokens that the server gives
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"

# ---- what may stand where something else should

TEXTS = ["", " ", "\x00", "\ud7ff\uffff", "\u202e", "🙂" * 50, "a" * 5000, "<|im_start|>system", "<|im_end|>",
         "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "</think>", "<tool_call>", "{{ 7 * 7 }}",
         "{% raw %}", "%s%n",
         "../../etc/passwd", "file:///etc/passwd", "tiny", "user", "\u2402turn0\u2403", "e\u0301",
         "\r\n\r\n"]  # fmt: skip
ELSEWHERE = ["http://127.0.0.1/x.png", "https://images.example/x", "file:///etc/passwd", "ftp://x", "x.png", "//x",
             "/etc/passwd", "javascript:1", "data:", "data:,", "data:image/png;base64", "\x00", ""]  # fmt: skip
DIRT = [b"\x00", b"\xff\xfe", b"\\ud800", b"NaN", b"1e999", b"}{", b"\xed\xa0\x80", b'"']
TYPES = [None, b"text/plain", b"", b"application/json; x", b"\xff"]
HOSTS = [b"evil.example", b"", b"127.0.0.1.evil.example", b"\xe9", b"[", b"]:[", b"a" * 3000, b"::::"]
LENGTHS = [b"-1", b"abc", b"", b"1e3", b"99999999999999999999", b"9999", b"5, 6", b"0x10"]
METHODS = [b"GET", b"PUT", b"DELETE", b"TRACE", b"CONNECT", b"PO ST", b"\xff", b"", b"post"]
PATHS = ["/", "/v1", "/v1/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//v1/chat/completions", CHAT + "/",
         CHAT + "?x=%00", "/v1/models/%ff", "*", "http://evil.example/v1/models", "/" + "a" * 9000, "/%"]  # fmt: skip
CHUNKS = [b"zz\r\nabc\r\n0\r\n\r\n", b"-1\r\n\r\n", b"ffffffffffffffffff\r\n", b"3\r\nabcd\r\n0\r\n\r\n",
          b"0\r\n\r\n"]  # fmt: skip
KEYS = [b"Bearer", b"Basic \xff", b"", b"Bearer " + b"k" * 9000]
NOT_HTTP = [b"\x16\x03\x01\x02\x00\x01\x00", b"GET /\r\n\r\n", b"\x00" * 64, b"PRI * HTTP/2.0\r\n\r\n", b"\r\n" * 20,
            b"G", b"POST " + CHAT.encode() + b" HTTP/9.9\r\nHost: localhost\r\n\r\n"]  # fmt: skip
NUMBERS = [0, -0.0, -1, 1, 2, 3.5, 1e308, -1e308, 1e-320, 2**31, 2**53 + 1, 2**63, 2**64, 10**40, -(2**63)]


def value(r, depth=0):
    kind = r.randrange(9 if depth < 3 else 6)
    if kind < 2:
        return r.choice(TEXTS)
    if kind < 4:
        return r.choice(NUMBERS)
    if kind < 6:
        return r.choice([None, True, False, [], {}])
    if kind < 8:
        names = [*TEXTS[:9], "role", "type", "text", "url"]
        return {r.choice(names): value(r, depth + 1) for _ in range(r.randrange(4))}
    return [value(r, depth + 1) for _ in range(r.randrange(4))]


def whole(r):
    """A good request, rich in fields."""
    if r.random() < 0.15:
        return {"model": "tiny", "prompt": "yes no", "max_tokens": 3, "stop": ["x"], "seed": 1, "temperature": 0.5}
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
    return {
        "model": "tiny", "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "seed": 3, "stream": r.random() < 0.4,
        "stream_options": {"include_usage": True}, "stop": "zz", "n": 1, "tool_choice": "auto",
        "response_format": {"type": "text"}, "user": "me",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "colour?"},
                                         {"type": "image_url", "image_url": {"url": picture(r), "detail": "low"}}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "red"},
            {"role": "user", "content": "sure?"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}],
    }  # fmt: skip


def places(node, path=()):
    """Every path into a JSON value."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, below in items:
        yield from places(below, (*path, key))


def changed(r):
    """A request with one to three things replaced, removed, doubled or renamed."""
    body = whole(r)
    for _ in range(r.choice([1, 1, 2, 3])):
        path = r.choice([path for path in places(body) if path])
        node = body
        for key in path[:-1]:
            node = node[key]
        key, how = path[-1], r.randrange(5)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, list):
            node.extend([copy.deepcopy(node[key])] * r.choice([1, 5, 1100]))
        elif how == 2 and isinstance(node, dict):
            node[r.choice(TEXTS)] = node.pop(key)
        else:
            node[key] = value(r)
    return body


def picture(r):
    kinds = [("RGB", "PNG"), ("P", "GIF"), ("RGB", "JPEG"), ("RGBA", "WEBP"), ("1", "BMP"), ("LA", "PNG")]
    mode, kind = r.choice(kinds)
    file = io.BytesIO()
    Image.new(mode, (r.choice([1, 14, 56, 90]), r.choice([1, 28, 60]))).save(file, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def bad_picture(r):
    how = r.randrange(9)
    url = picture(r)
    head, _, data = url.partition(",")
    raw = bytearray(base64.b64decode(data))
    if how == 0:
        for _ in range(r.choice([1, 4, 30])):
            raw[r.randrange(len(raw))] = r.randrange(256)
    elif how == 1:
        raw = raw[: r.randrange(len(raw))]
    elif how == 2:
        raw = bytearray(r.randbytes(r.choice([0, 1, 8, 500])))
    elif how == 3:  # a header that promises a picture of any size
        file = io.BytesIO()
        Image.new("1", r.choice([(4000, 3000), (1, 60000), (60000, 1)])).save(file, "PNG")
        raw = bytearray(file.getvalue())
    elif how == 4:
        return r.choice(ELSEWHERE)
    elif how == 5:
        return head + "," + data + r.choice(["=", "%", "\n", "é", "===="])
    elif how == 6:
        raw = raw[:8] + bytes(r.randbytes(20)) + raw[8:]
    elif how == 7:
        return head.replace(";base64", r.choice(["", ";base32", ";utf8;base64", ";BASE64"])) + "," + data
    else:
        raw = bytearray(b"<svg xmlns='http://www.w3.org/2000/svg' width='9999999' height='9999999'/>")
    return head + "," + base64.b64encode(bytes(raw)).decode()


def with_pictures(r):
    body = whole(r)
    parts = [{"type": "image_url", "image_url": {"url": bad_picture(r)}} for _ in range(r.choice([1, 1, 2, 20]))]
    body["messages"] = [{"role": r.choice(["user", "user", "system", "assistant", "tool"]), "content": parts}]
    return body


def sized(r):
    """Too much, or too little, of something."""
    body, how = whole(r), r.randrange(9)
    if how == 0:
        body["messages"] = [{"role": "user", "content": "yes no " * r.choice([0, 700, 30_000])}]
    elif how == 1:
        body["messages"] = [{"role": r.choice(["user", "assistant"]), "content": "x"}] * r.choice([0, 1025, 1100])
    elif how == 2:
        body["tools"] = (body.get("tools") or [{}]) * r.choice([0, 129, 200])
    elif how == 3:
        body["stop"] = ["y" * n for n in range(r.choice([17, 300]))]
    elif how == 4:
        body["max_tokens"] = r.choice([0, -1, MOST + 1, 10**9, 10**30, 1.5, "many"])
    elif how == 5:
        deep = json.dumps({"model": "tiny", "messages": 0}).replace("0}", "[" * 4000 + "]" * 4000 + "}")
        return deep.encode()
    elif how == 6:
        body["messages"] = [{"role": "user", "content": "x" * 390_000}]
    elif how == 7:
        return b" " * 400_001
    else:
        body["messages"] = [{"role": "user", "content": [{"type": "text", "text": "yes "}] * 3000}]
    return body


def torn(r):
    """Bytes that are JSON no more."""
    raw = bytearray(json.dumps(whole(r), ensure_ascii=False).encode())
    for _ in range(r.choice([1, 2, 9])):
        place, how = r.randrange(len(raw)), r.randrange(4)
        if how == 0:
            raw[place] = r.randrange(256)
        elif how == 1:
            del raw[place : place + r.choice([1, 5, 400])]
        elif how == 2:
            raw[place:place] = r.choice(DIRT)
        else:
            raw = raw[:place]
        if not raw:
            break
    return r.choice([b"\xef\xbb\xbf", b"", b"", b""]) + bytes(raw)


# ---- how it is sent

def message(body, path=CHAT, method=b"POST", headers=()):
    lines = [method + b" " + path.encode() + b" HTTP/1.1"]
    given = {b"host": b"127.0.0.1", b"content-type": b"application/json", b"content-length": str(len(body)).encode()}
    for name, content in headers:
        given.pop(name.lower(), None)
        if content is not None:
            lines.append(name + b": " + content)
    lines += [name + b": " + content for name, content in given.items()]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def odd_message(r):
    """A request that is strange before its body begins."""
    good = json.dumps(whole(r)).encode()
    how = r.randrange(16)
    if how == 0:
        return message(good, headers=[(b"Content-Type", r.choice(TYPES))])
    if how == 1:
        return message(good, headers=[(b"Host", r.choice(HOSTS))])
    if how == 2:
        return message(good, headers=[(b"Content-Length", r.choice(LENGTHS))])
    if how == 3:
        return message(good, headers=[(b"X-Large", b"a" * r.choice([1000, 70_000, 300_000]))])
    if how == 4:
        return message(good, headers=[(b"X-%d" % n, b"y") for n in range(r.choice([50, 5000]))])
    if how == 5:
        return message(good, headers=[(r.choice([b"X\x00", b"X Y", b"", b"X\xe9", b"\tX"]), b"y")])
    if how == 6:
        return message(good, headers=[(b"X", r.choice([b"\x00", b"a\rb", b"a\nb: c", b"\xff" * 20]))])
    if how == 7:
        return message(good, method=r.choice(METHODS))
    if how == 8:
        return message(good, path=r.choice(PATHS))
    if how == 9:
        return message(good, headers=[(b"Transfer-Encoding", r.choice([b"chunked", b"gzip", b"chunked, chunked"]))])
    if how == 10:
        chunked = [(b"Content-Length", None), (b"Transfer-Encoding", b"chunked")]
        return message(r.choice(CHUNKS), headers=chunked)
    if how == 11:
        return message(good, headers=[(b"Content-Encoding", b"gzip"), (b"Expect", b"100-continue")])
    if how == 12:
        return message(good, headers=[(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")])
    if how == 13:
        return message(good, headers=[(b"Authorization", r.choice(KEYS))])
    if how == 14:
        return r.choice([*NOT_HTTP, r.randbytes(200)])
    return message(good)[: r.randrange(10, 400)]


def request(number):
    """(bytes, whether it is a whole HTTP request, what kind it is)."""
    r = random.Random(SEED * 10_000 + number)
    make = r.choices([changed, torn, with_pictures, sized, odd_message], [38, 18, 20, 9, 15])[0]
    if make is odd_message:
        return odd_message(r), False, "odd_message"
    body = make(r)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    path = COMPLETE if isinstance(body, dict) and "prompt" in body else r.choice([CHAT] * 15 + [COMPLETE])
    return message(raw, path), True, make.__name__
