"""What is asked of the dial in one pipeline, check by check.

Distances are largest differences over the largest difference of the anchor and the reference.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deradiff
from benchmarks.diffusers_tests.anchors import (
    SavedAnchor,
    between,
    full_anchor,
    in_place,
    lora_anchor,
)
from benchmarks.diffusers_tests.by_hand import ByHand
from benchmarks.diffusers_tests.subject import Subject
from deradiff.realignment.clipping import clipping_setting
from deradiff.realignment.dial import Dial

LAM = 0.5
LAMS = (0.25, 0.875)
"""Of two images of one call: the same in single precision, for stages that round to 8 bits."""

FAR = 1e-3
"""A distance that rounding does not make."""

KL_ERROR = 1e-4
"""Of a path KL, as a share of it: the dial sums it in single precision."""

YES = "yes"
WRONG = "wrong"
CRASH = "crash"
REFUSED = "refused"
UNKNOWN = "unknown"
NOT_ASKED = "not asked"
"""What a check ends as; all but the first with a reason behind it."""

Answer = str
"""One of these words, and behind a colon the reason."""


class Checks:
    """The checks of one pipeline.

    Args:
        subject: the pipeline.
        stock: what it samples.
        folder: where anchors are saved.

    Attributes:
        answers: of each check, by its name.
    """

    def __init__(self, subject: Subject, stock: Tensor, folder: Path) -> None:
        self.subject = subject
        self.stock = stock
        self.folder = folder
        self.answers: dict[str, Answer] = {}

    def run(self) -> None:
        """Do all checks; of a pipeline that is refused only what a refusal leaves behind."""
        networks = self.subject.networks
        self.full = full_anchor(networks, self.folder / "full")
        before = _fingerprint(networks)
        self._ask("is taken", self._is_taken)
        if self.answers["is taken"] != YES:
            self._ask("is restored", lambda: self._is_restored(before))
            return

        self._run_full()
        self._run_modes()
        self._run_lambdas()
        self._ask("is restored", lambda: self._is_restored(before))
        name = next(iter(networks))
        if not hasattr(networks[name], "add_adapter"):
            self.answers["lora"] = f"{NOT_ASKED}: the network takes no adapter of peft"
        else:
            self._run_lora(name)
            self._ask("is restored after lora", lambda: self._is_restored(before))

    def _ask(self, name: str, check: Callable[[], Answer]) -> None:
        """Do one check. What it raises is an answer: a refusal of the dial's, or a crash."""
        try:
            self.answers[name] = check()
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            frames = traceback.extract_tb(error.__traceback__)
            is_ours = "deradiff" in Path(frames[-1].filename).parts
            if isinstance(error, ValueError) and is_ours:
                self.answers[name] = f"{REFUSED}: {text}"
            else:
                place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
                self.answers[name] = f"{CRASH}: {type(error).__name__}: {text} ({place})"

    def _is_taken(self) -> Answer:
        """Whether the pipeline is realigned, or refused before or at the first step."""
        with self._realigned(self.full, LAM) as dial:
            self.middle = self.subject.sample()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                self.path_kl = dial.path_kl.double().flatten()
            self.said = "; ".join(str(warning.message) for warning in said)
        return YES

    def _is_restored(self, before: Any) -> Answer:
        """Whether the networks are what they were, and sample what they did."""
        if _fingerprint(self.subject.networks) != before:
            return f"{WRONG}: the network has something on it that it had not before"
        return _same(self.subject.sample(), [self.stock])

    @contextmanager
    def _realigned(self, anchor: SavedAnchor, lam: Any, **options: Any) -> Iterator[Dial]:
        """The pipeline inside `realign`, without its warnings: they are no failures."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with deradiff.realign(self.subject.pipe, anchor.folder, lam, **options) as dial:
                yield dial

    def _sample_at(self, anchor: SavedAnchor, lam: Any, **options: Any) -> Tensor:
        """What the realigned pipeline samples."""
        with self._realigned(anchor, lam, **options):
            return self.subject.sample()

    # The mixture of outputs.

    def _run_full(self) -> None:
        """A full anchor: both ends, the middle, and its path KL."""
        aligned = self._stock_forms(self.full)
        self.unit = _distance(aligned[0], self.stock)
        self._ask("lam=0", lambda: _same(self._sample_at(self.full, 0), [self.stock]))
        self._ask("lam=1", lambda: _same(self._sample_at(self.full, 1), aligned, self.unit))
        self._ask("lam=0.5 is neither", lambda: self._is_neither(self.middle, aligned[0]))
        self._ask("mixture", self._is_mixture)
        self._ask("path KL", self._has_path_kl)

    def _stock_forms(self, anchor: SavedAnchor) -> list[Tensor]:
        """What stock pipelines sample with the anchor, by the ways in which its weights got there.

        They lie elsewhere in memory in each, which may change the last bits of a product.
        """
        with self.subject.replaced(anchor.networks):
            forms = [self.subject.sample()]
        if anchor is self.full:
            with _all_in_place(self.subject.networks, anchor.weights):
                forms.append(self.subject.sample())
        return forms

    def _is_neither(self, middle: Tensor, aligned: Tensor) -> Answer:
        """Whether the dial does anything between 0 and 1."""
        if self.unit == 0:
            return f"{NOT_ASKED}: the output does not depend on the denoiser here"
        if not bool(middle.isfinite().all()) and bool(self.stock.isfinite().all()):
            return f"{WRONG}: it is not finite"
        for name, end in (("reference", self.stock), ("anchor", aligned)):
            if torch.equal(middle, end):
                return f"{WRONG}: it is the {name}"
        return YES

    def _is_mixture(self) -> Answer:
        """Whether the middle is what mixing by hand makes."""
        self.by_hand = ByHand(self.subject, self.full.weights, LAM)
        return _near(self.middle, self.by_hand.sample(), self.unit)

    def _has_path_kl(self) -> Answer:
        """Whether the path KL is that of a second run."""
        found = self.path_kl
        if bool(found.isnan().any()):
            said = self.said
            return f"{UNKNOWN}: {said}" if said else f"{WRONG}: it is nan, and nothing says why"
        if not bool((found > 0).all()):
            return f"{WRONG}: it is {found.tolist()}"
        # A step that clips is measured on itself, which no run on outputs can tell.
        if clipping_setting(self.subject.pipe.scheduler):
            return YES
        expected = self.by_hand.path_kl()
        error = float(((found - expected) / expected).abs().max())
        if not error < KL_ERROR:
            return f"{WRONG}: it is {found.tolist()}, and by hand {expected.tolist()}"
        return YES

    # Modes.

    def _run_modes(self) -> None:
        """Modes `weights` and `reuse`."""
        self._ask("mode=weights", self._is_between_weights)
        self._ask("mode=reuse", self._is_reused)

    def _is_between_weights(self) -> Answer:
        """Whether mode `weights` is the network between both."""
        found = self._sample_at(self.full, LAM, mode="weights")
        networks = self.subject.networks
        middle = {}
        for name, network in networks.items():
            middle[name] = between(network, self.full.weights[name], LAM)
        with _all_in_place(networks, middle):
            expected = self.subject.sample()
        return _near(found, expected, self.unit)

    def _is_reused(self) -> Answer:
        """Whether mode `reuse` is exact where it leaves nothing out, and cheaper where it does."""
        answer = _near(
            self._sample_at(self.full, LAM, mode="reuse", every=1), self.middle, self.unit
        )
        if answer != YES:
            return answer
        # A denoiser that has one step, or the last one of a stage, leaves nothing out.
        with self._realigned(self.full, LAM, mode="reuse", every=2) as dial:
            found = self.subject.sample(**self.subject.longer())
            evaluations = dial.evaluations
        if not bool(found.isfinite().all()) and bool(self.stock.isfinite().all()):
            return f"{WRONG}: it is not finite"
        if not evaluations < 2:
            return f"{WRONG}: {evaluations} evaluations a step"
        return YES

    # Kinds of lambda.

    def _run_lambdas(self) -> None:
        """A schedule, a lambda for each image, and particles."""
        self._ask("schedule", self._follows_schedule)
        option = self.subject.images_argument
        if option is None:
            self.answers["lam of each image"] = f"{NOT_ASKED}: one image a call"
            self.answers["particles"] = f"{NOT_ASKED}: one image a call"
            return
        two = {option: 2}
        try:
            self.subject.sample(**two)
        except Exception:
            answer = f"{NOT_ASKED}: the stock pipeline fails with two images of a prompt"
            self.answers |= {"lam of each image": answer, "particles": answer}
            return
        self._ask("lam of each image", lambda: self._has_lam_of_each(two))
        self._ask("particles", lambda: self._has_particles(two))

    def _follows_schedule(self) -> Answer:
        """Whether time goes from 0 to 1 for a schedule."""
        fractions: list[float] = []

        def schedule(fraction: float) -> float:
            fractions.append(fraction)
            return LAM

        found = self._sample_at(self.full, schedule)
        is_in_range = all(-1e-6 <= fraction <= 1 + 1e-6 for fraction in fractions)
        # A pipeline that samples in stages begins anew.
        falls = sum(later < before - 1e-6 for before, later in pairwise(fractions))
        stands_still = len(set(fractions)) == 1 and len(self.by_hand.steps) > 1
        if not is_in_range or stands_still or falls > len(fractions) // 2:
            return f"{WRONG}: the fractions of time are {fractions}"
        return _near(found, self.middle, self.unit)

    def _has_lam_of_each(self, two: dict[str, int]) -> Answer:
        """Whether each of two images has its own lambda."""
        if not self._are_apart(two):
            return f"{NOT_ASKED}: an image of the stock pipeline depends on the others of its call"
        with self._realigned(self.full, torch.tensor(LAMS)) as dial:
            together = self.subject.sample_each(2, **two)
            for image, lam in enumerate(LAMS):
                dial.lam = lam
                alone = self.subject.sample_each(2, **two)
                answer = _near(together[image], alone[image], self.unit)
                if answer != YES:
                    return f"{answer}, in image {image}"
        return YES

    def _are_apart(self, two: dict[str, int]) -> bool:
        """Whether the noise of one image changes nothing of the other in the stock pipeline."""
        found = []
        for seed in (1, 2):
            generators = [torch.Generator().manual_seed(number) for number in (0, seed)]
            try:
                found.append(self.subject.sample_each(2, generator=generators, **two)[0])
            except Exception:
                # It takes one generator for all.
                return True
        return _near(found[0], found[1], self.unit) == YES

    def _has_particles(self, two: dict[str, int]) -> Answer:
        """Whether particles run, and are weighed."""
        with self._realigned(self.full, LAM, particles=2) as dial:
            found = self.subject.sample(**two)
            size = dial.ess
        if not bool(found.isfinite().all()) and bool(self.stock.isfinite().all()):
            return f"{WRONG}: they are not finite"
        if not bool(((size >= 1) & (size <= 2)).all()):
            return f"{WRONG}: their effective number is {size.tolist()} of 2"
        return YES

    # A LoRA.

    def _run_lora(self, name: str) -> None:
        """A LoRA anchor: both ends, and the middle."""
        try:
            lora = lora_anchor(self.subject.pipe, name, self.folder / "lora")
            with self.subject.replaced(lora.networks):
                aligned = self.subject.sample()
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            self.answers["lora"] = f"{NOT_ASKED}: the stock pipeline takes none ({why})"
            return
        self.unit = _distance(aligned, self.stock)
        if self.unit == 0:
            self.answers["lora"] = f"{NOT_ASKED}: it changes nothing here"
            return
        self._ask("lora lam=0", lambda: _same(self._sample_at(lora, 0), [self.stock]))
        if self.answers["lora lam=0"].startswith(REFUSED):
            return
        self._ask("lora lam=1", lambda: _same(self._sample_at(lora, 1), [aligned], self.unit))
        self._ask("lora mixture", lambda: self._is_lora_mixture(lora, aligned))
        self._ask("lora batched", lambda: self._is_batched(lora))

    def _is_lora_mixture(self, lora: SavedAnchor, aligned: Tensor) -> Answer:
        """Whether the middle is what mixing by hand makes, and neither end."""
        self.lora_middle = self._sample_at(lora, LAM)
        answer = self._is_neither(self.lora_middle, aligned)
        if answer != YES:
            return answer
        expected = ByHand(self.subject, lora.weights, LAM).sample()
        return _near(self.lora_middle, expected, self.unit)

    def _is_batched(self, lora: SavedAnchor) -> Answer:
        """Whether a joint batch of anchor and reference is the same."""
        found = self._sample_at(lora, LAM, batched=True)
        return _near(found, self.lora_middle, self.unit)


@contextmanager
def _all_in_place(
    networks: dict[str, nn.Module], weights: dict[str, dict[str, Tensor]]
) -> Iterator[None]:
    """Every network with other weights."""
    if not networks:
        yield
        return
    (name, network), *others = networks.items()
    with in_place(network, weights[name]), _all_in_place(dict(others), weights):
        yield


def _fingerprint(networks: dict[str, nn.Module]) -> Any:
    """What of networks has to be as before: modules, weights, attributes, adapters and hooks."""
    found: list[Any] = []
    for network in networks.values():
        for name, module in network.named_modules():
            hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
            found.append((name, id(module), hooks))
        for name, weight in network.named_parameters():
            total = weight.detach().double().sum().item()
            found.append((name, id(weight), weight.data_ptr(), weight.requires_grad, total))
        found.append(sorted(vars(network)))
        found.append(sorted(getattr(network, "peft_config", {})))
    return found


def _same(found: Tensor, forms: list[Tensor], unit: float = 1.0) -> Answer:
    """Whether something is one of several, bit for bit."""
    if any(_is_equal(found, form) for form in forms):
        return YES
    return f"{WRONG}: it is {_distance(found, forms[0]) / max(unit, 1e-30):.2g} away"


def _is_equal(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def _near(found: Tensor, expected: Tensor, unit: float) -> Answer:
    """Whether something is what is expected, but for rounding."""
    if _is_equal(found, expected):
        return YES
    distance = _distance(found, expected) / max(unit, 1e-30)
    return YES if distance < FAR else f"{WRONG}: it is {distance:.2g} away"


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    if a.shape != b.shape or not len(a):
        return float("inf")
    return float((a - b).abs().max())
