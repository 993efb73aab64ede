"""Which scorer, and where its files or its server are: what configs and callers pass around."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

VARIABLE_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
"""An environment variable's name. Keys have small letters or dashes in them, and do not match."""


@dataclass(frozen=True)
class Endpoint:
    """A server that answers OpenAI-style chat requests with images, and how it is asked.

    Attributes:
        url: of its API, such as `https://host/v1`; `/chat/completions` is added to it.
        model: as the server names it.
        api_key_variable: the environment variable that holds the API key; None: no key is sent.
        temperature: 0 for answers that do not vary; None: the server's own.
        image_side: an image's longest side is reduced to so many pixels; None: it stays as it is.
        max_tokens: of an answer.
        in_flight: requests at once, at most.
        per_minute: requests in a minute, at most; None: any number.
        timeout: seconds that the server has to answer in.
        price_in: of a million tokens that the model reads; None: not known.
        price_out: of a million tokens that it writes; None: not known.
        plain_http: send images and key without TLS to another machine.

    Raises:
        ValueError: for values that cannot be meant; the message begins with the argument.
    """

    url: str
    model: str
    api_key_variable: str | None = None
    temperature: float | None = 0.0
    image_side: int | None = None
    max_tokens: int = 1024
    in_flight: int = 8
    per_minute: float | None = None
    timeout: float = 120.0
    price_in: float | None = None
    price_out: float | None = None
    plain_http: bool = False

    def __post_init__(self) -> None:
        self._check_url()
        if not self.model.strip():
            raise ValueError("model= is empty: give model=<as the server names it>")
        variable = self.api_key_variable
        if variable is not None and not VARIABLE_NAME.fullmatch(variable):
            # It may be the key itself, which no message may hold
            raise ValueError(
                "api_key_variable= is the name of an environment variable, in capital letters, and "
                "not a key: type export JUDGE_KEY=..., and give api_key_variable=JUDGE_KEY"
            )
        for name in ("image_side", "max_tokens", "in_flight", "per_minute", "timeout"):
            self._check_above_zero(name)
        for name in ("temperature", "price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value:g} must be at least 0")

    def _check_above_zero(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value:g} must be above 0")

    def _check_url(self) -> None:
        """Refuse an address that is none, holds a secret, or would send images in the clear."""
        parts = urlsplit(self.url)
        # What may hold a password is not repeated
        if parts.username is not None or parts.password is not None or parts.query:
            raise ValueError(
                "url= holds a user, a password or a query: give the address alone, and the key by "
                "api_key_variable=<an environment variable's name>"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment:
            raise ValueError(
                f"url={self.url} is no address of a server: give one as http://localhost:8000/v1 "
                "or https://host/v1"
            )
        if parts.scheme == "http" and not self.is_loopback and not self.plain_http:
            raise ValueError(
                f"url={self.url} would send images and key without encryption to another machine: "
                "give https://, or plain_http=true where the network is yours"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether the server is on this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def host(self) -> str:
        """The server's name and port."""
        return urlsplit(self.url).netloc


@dataclass(frozen=True)
class ScorerSpec:
    """A scorer and its files. A file that is None is the published one.

    Attributes:
        name: a key of `deradiff.scorers.SCORERS`; with `file`, any label.
        checkpoint: of the network: a hub id, `org/name/file` or a path.
        tokenizer: a folder or hub id.
        model_config: an open_clip config, where the sizes are not the published ones.
        head: of the aesthetic scorer: its linear layers.
        file: a Python file of the user's with one scorer class.
        endpoint: of a judge: its server.
        rubric: of a judge: one that ships, or a file of the user's.
    """

    name: str
    checkpoint: str | None = None
    tokenizer: str | None = None
    model_config: str | None = None
    head: str | None = None
    file: str | None = None
    endpoint: Endpoint | None = None
    rubric: str | None = None


AGAINST = ("reference", "target", "anchor")
"""What a judge of pairs may compare a realigned model with."""


@dataclass(frozen=True)
class PairwiseSpec:
    """A judge of pairs behind a server, and what it judges.

    Attributes:
        endpoint: its server.
        rubric: one about two images, that ships or is a file of the user's; None: the default one.
        against: of `AGAINST`: what realigned models are compared with.

    Raises:
        ValueError: for an opponent that there is not.
    """

    endpoint: Endpoint
    rubric: str | None = None
    against: Sequence[str] = AGAINST[:1]

    def __post_init__(self) -> None:
        unknown = [name for name in self.against if name not in AGAINST]
        if unknown or not self.against:
            named = ",".join(self.against)
            raise ValueError(f"against=[{named}] must name some of {', '.join(AGAINST)}")
