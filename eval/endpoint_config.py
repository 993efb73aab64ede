"""The server of a judge, as the keys of a config say it. It imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields

from configs.checks import section
from configs.paths import check_path
from configs.settings import setting
from deradiff.scorers.rubrics import is_shipped
from deradiff.scorers.spec import AGAINST, Endpoint, PairwiseSpec


@dataclass
class EndpointConfig:
    """A server with an OpenAI-style chat endpoint, and what it is asked."""

    url: str | None = setting(None, "a judge's server, such as http://localhost:8000/v1")
    model: str | None = setting(None, "the judge's model, as the server names it")
    rubric: str | None = setting(None, "what the judge is asked: a file, or one that ships")
    api_key_variable: str | None = setting(
        None, "the environment variable that holds the API key; null: none is sent"
    )
    temperature: float | None = setting(0.0, "of the judge's answers; null: the server's own")
    image_side: int | None = setting(
        None, "longest side of an image that is sent, in pixels; null: as it is"
    )
    max_tokens: int = setting(1024, "of a judge's answer")
    in_flight: int = setting(8, "requests at once, at most")
    per_minute: float | None = setting(None, "requests in a minute, at most; null: any number")
    timeout: float = setting(120.0, "seconds that the server has to answer in")
    price_in: float | None = setting(None, "of a million tokens read, for the cost that is printed")
    price_out: float | None = setting(None, "of a million tokens written, likewise")
    plain_http: bool = setting(False, "send images and key to another machine without TLS")

    def endpoint(self, key: str) -> Endpoint | None:
        """The server; None where none is named.

        Args:
            key: of this section, for messages.

        Raises:
            ValueError: where half of it is missing, or a value cannot be meant.
        """
        if self.url is None and self.model is None:
            return None
        for name, example in (("url", "http://localhost:8000/v1"), ("model", "<name>")):
            if getattr(self, name) is None:
                raise ValueError(f"{key}.{name} is missing: give {key}.{name}={example}")
        settings = {name: getattr(self, name) for name in ENDPOINT_KEYS}
        with section(key):
            return Endpoint(**settings)

    def check_rubric(self, key: str) -> None:
        """Refuse a rubric that is not there. Raises ValueError.

        Args:
            key: of this section, for messages.
        """
        if self.rubric is not None and not is_shipped(self.rubric):
            check_path(f"{key}.rubric", self.rubric, "a rubric's file", depth=0)


@dataclass
class PairwiseConfig(EndpointConfig):
    """A judge that chooses between the images of two models."""

    against: list[str] = setting(
        list(AGAINST[:1]), f"what realigned models are judged against, of {', '.join(AGAINST)}"
    )

    def spec(self, key: str) -> PairwiseSpec | None:
        """The judge for the library; None where none is named.

        Args:
            key: of this section, for messages.

        Raises:
            ValueError: where half of it is missing, or a value cannot be meant.
        """
        endpoint = self.endpoint(key)
        if endpoint is None and self.rubric is not None:
            raise ValueError(
                f"{key}.rubric is asked by nobody: give {key}.url=http://localhost:8000/v1 and "
                f"{key}.model=<as the server names it>"
            )
        if endpoint is None:
            return None
        with section(key):
            return PairwiseSpec(endpoint, self.rubric, self.against)


ENDPOINT_KEYS = tuple(field.name for field in fields(Endpoint))
SERVER_KEYS = (*ENDPOINT_KEYS, "rubric")

HOW_IT_IS_ASKED = (
    "url",
    "api_key_variable",
    "max_tokens",
    "in_flight",
    "per_minute",
    "timeout",
    "price_in",
    "price_out",
    "plain_http",
)
"""Keys that no answer depends on."""
