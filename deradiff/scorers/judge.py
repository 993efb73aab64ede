"""A judge: a vision-language model behind an OpenAI-style chat endpoint, asked by a rubric.

Here it gives an image a number. `deradiff.scorers.pairwise` lets it choose between two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from deradiff.digests import digest_of_text
from deradiff.scorers.answers import UnreadableAnswer
from deradiff.scorers.chat import ChatClient, Clock, NoAnswer, images_message
from deradiff.scorers.rubrics import Rubric, load_rubric
from deradiff.scorers.spec import Endpoint, ScorerSpec
from deradiff.texts import printable

ASKS = 3
"""How often an image is asked about until the answer can be read."""

SHOWN = 120
"""Characters of an answer in a message."""

TRIAL_SIDE = 64
"""Pixels of the white image with which a server is tried out."""


class ModelJudge:
    """A model behind a server that answers a rubric.

    Args:
        endpoint: the server.
        rubric: what the model is asked, and how its answer is read.
        clock: of the waiting.

    Attributes:
        client: the server.
        version: a digest of what the answer depends on: the model, the rubric, the size of images
            and the temperature; not the address.
        preprocessing: what happens to an image.

    Raises:
        ValueError: where the API key is not there.
    """

    def __init__(self, endpoint: Endpoint, rubric: Rubric, clock: Clock | None = None) -> None:
        self.endpoint = endpoint
        self.rubric = rubric
        self.client = ChatClient(endpoint, clock)
        depends_on = [endpoint.model, rubric.text, endpoint.image_side, endpoint.temperature]
        self.version = digest_of_text(json.dumps(depends_on))
        size = "size as it is"
        if endpoint.image_side is not None:
            size = f"longest side at most {endpoint.image_side}"
        self.preprocessing = f"image: RGB, {size}, PNG; prompt: as typed, in the rubric"

    def answer(self, images: Sequence[Image.Image], prompt: str) -> float:
        """What the model says of images of one prompt, read by the rubric.

        An answer that cannot be read is shown to the model, which is asked again.

        Raises:
            NoAnswer: where no answer can be read.
            ValueError: where the server cannot be asked.
        """
        rgb = [image.convert("RGB") for image in images]
        question = self.rubric.question(prompt)
        messages = [images_message(rgb, question, self.endpoint.image_side)]
        reason = ""
        for _ in range(ASKS):
            text = self.client.ask(messages)
            try:
                return self.rubric.form.read(text)
            except UnreadableAnswer as error:
                start = printable(" ".join(text.split()))[:SHOWN]
                reason = f"{error}: {start!r}"
                again = f"That cannot be read: {error}. Answer with {self.rubric.form.wanted()}."
                messages.append({"role": "assistant", "content": text or "(nothing)"})
                messages.append({"role": "user", "content": again})
        raise NoAnswer(
            f"{self.endpoint.model} was asked {ASKS} times and gave no answer that the rubric "
            f"{self.rubric.name} reads; {reason}"
        )

    def try_out(self, images: int) -> None:
        """Ask the server one question, so that what is wrong with it shows now.

        Args:
            images: how many the question is about.

        Raises:
            ValueError: where it cannot be asked.
        """
        white = Image.new("RGB", (TRIAL_SIDE, TRIAL_SIDE), "white")
        question = self.rubric.question("a white square")
        self.client.ask([images_message([white] * images, question, self.endpoint.image_side)])


class Judge(ModelJudge):
    """A judge behind the `Scorer` protocol: a number for each image.

    Args:
        endpoint: the server.
        rubric: one about a single image.
        clock: of the waiting.
    """

    name = "judge"

    def __init__(self, endpoint: Endpoint, rubric: Rubric, clock: Clock | None = None) -> None:
        super().__init__(endpoint, rubric, clock)
        self.scale = rubric.form.scale

    def score(self, image: Image.Image, prompt: str) -> float:
        """The number of one image. Threads may call it at once.

        Raises:
            NoAnswer: where the model gives none that can be read.
            ValueError: where the server cannot be asked.
        """
        return self.answer([image], prompt)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Score images, each for its own prompt.

        Returns:
            (N,), float32 on the CPU.

        Raises:
            ValueError: where there is not one prompt for each image, or one image gets no number.
        """
        if len(images) != len(prompts):
            raise ValueError(
                f"{self.name} scores each image for its own prompt: got {len(images)} images and "
                f"{len(prompts)} prompts"
            )
        scores = torch.empty(len(images))

        def score_one(index: int) -> None:
            scores[index] = self.score(images[index], prompts[index])

        self.client.for_each(score_one, range(len(images)))
        return scores


def endpoint_of(spec: ScorerSpec) -> Endpoint:
    """The server of a spec. Raises ValueError where there is none."""
    if spec.endpoint is None:
        raise ValueError(
            f"the scorer {spec.name} is a model behind a server: give endpoint=Endpoint(url=..., "
            "model=...)"
        )
    return spec.endpoint


def check(spec: ScorerSpec) -> None:
    """Raises ValueError where `load` would; the server is not asked."""
    load(spec, "cpu")


def load(spec: ScorerSpec, device: str) -> Judge:
    """The judge of a spec; its network is elsewhere, whatever the device."""
    return Judge(endpoint_of(spec), load_rubric(spec.rubric, images=1))
