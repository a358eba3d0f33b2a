"""Presigned URLs that take a body of one size: Signature Version 4 with Content-Length among the signed headers.

https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
from functools import reduce
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

_SIGNED_HEADERS = "content-length;host"


def for_size(url: str, size: int, secret_key: str) -> str:
    """The same URL for a PUT of exactly `size` bytes: the server computes the signature from the length it is sent.

    url: presigned for its host alone, as clients of S3 presign.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    del query["X-Amz-Signature"]
    query["X-Amz-SignedHeaders"] = _SIGNED_HEADERS
    canonical_query = "&".join(f"{_encoded(name)}={_encoded(value)}" for name, value in sorted(query.items()))
    request = "\n".join(
        [
            "PUT",
            parts.path,
            canonical_query,
            f"content-length:{size}",
            f"host:{parts.netloc}",
            "",
            _SIGNED_HEADERS,
            "UNSIGNED-PAYLOAD",
        ]
    )
    scope = query["X-Amz-Credential"].split("/")[1:]
    to_sign = "\n".join(
        [
            query["X-Amz-Algorithm"],
            query["X-Amz-Date"],
            "/".join(scope),
            hashlib.sha256(request.encode()).hexdigest(),
        ]
    )
    key = reduce(_hmac, scope, f"AWS4{secret_key}".encode())
    signature = _hmac(key, to_sign).hex()
    return urlunsplit(parts._replace(query=f"{canonical_query}&X-Amz-Signature={signature}"))


def _encoded(text: str) -> str:
    return quote(text, safe="-_.~")


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")
