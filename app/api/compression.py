"""gzip and deflate for `infer`: inflating is bounded while it runs, not after.

Only `infer` compresses. A client library that decompresses nothing else could not read a
compressed error or metadata document.
"""

import gzip
import zlib

from app.api.v2_errors import EncodingCorrupt, EncodingRefused, TooManyBytes, shown

# How zlib is told which frame to expect.
GZIP_BITS = 31
ZLIB_BITS = 15
# At most this many times its size can a deflated body hold.
LARGEST_RATIO = 1032
SLICE_BYTES = 16 * 1024
LEVEL = 1


def inflate(body: bytes | bytearray, encoding: str, max_bytes: int) -> bytearray:
    """The body as it was before `Content-Encoding`.

    Memory stays below `max_bytes` and one slice inflated, whatever the body claims.

    Raises:
        EncodingRefused: another encoding than gzip and deflate (the zlib format of RFC 1950).
        TooManyBytes: over `max_bytes`.
        EncodingCorrupt: damaged, cut short, or followed by something else.
    """
    bits = {"gzip": GZIP_BITS, "x-gzip": GZIP_BITS, "deflate": ZLIB_BITS}.get(encoding)
    if bits is None:
        raise EncodingRefused(f"Content-Encoding {shown(encoding)} is neither gzip nor deflate")
    inflater = zlib.decompressobj(bits)
    inflated = bytearray()
    with memoryview(body) as view:
        for start in range(0, len(view), SLICE_BYTES):
            piece = view[start : start + SLICE_BYTES]
            try:
                inflated += inflater.decompress(piece, max_bytes - len(inflated) + 1)
            except zlib.error as error:
                raise EncodingCorrupt(f"the {encoding} body is damaged: {error}") from None
            if len(inflated) > max_bytes:
                raise TooManyBytes(f"the body inflates to more than {max_bytes} bytes")
            if inflater.unused_data:
                break
    if not inflater.eof or inflater.unused_data:
        raise EncodingCorrupt(f"the {encoding} body is cut short, or more follows its end")
    return inflated


def accepted_encoding(header: str) -> str | None:
    """gzip or deflate, whichever `Accept-Encoding` allows; gzip first."""
    allowed = set()
    for item in header.lower().split(","):
        name, _, parameters = item.partition(";")
        quality = parameters.partition("q=")[2].strip()
        if quality.strip("0.") or not quality:
            allowed.add(name.strip())
    return next((name for name in ("gzip", "deflate") if name in allowed), None)


def deflate(body: bytes, encoding: str) -> bytes:
    """`body` as gzip, or as the zlib format that HTTP calls deflate."""
    if encoding == "gzip":
        return gzip.compress(body, LEVEL, mtime=0)
    return zlib.compress(body, LEVEL)
