"""Whether a candidate is better than the champion: on the same test images, by more than chance, and worse in nothing
that is guarded. Pure functions of two verdicts and of which images each gets right."""

from pydantic import BaseModel, ConfigDict, Field

from pipeline.metrics import Verdict, mcnemar

SMALLEST_P = 1e-12  # of those below it, the exact test rounds some to 0, which none is


class PromoteConfig(BaseModel):
    """Under which name a run's model is registered, and when it becomes the champion of that name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        "lenet",
        description="Name to register the model under, each run as a new version.",
        pattern=r"^[a-z0-9][a-z0-9-]{0,63}$",
    )
    promote: bool = Field(True, description="Let the model become the champion if it is better than the one that is.")
    min_gain: float = Field(
        0.0, ge=0, le=1, description="Test accuracy that a model has to gain on the champion at least."
    )
    max_p: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Highest p-value, of McNemar's exact test, at which a gain counts as one. Of many models that are "
        "held against the same test images one is lucky in time: a nightly run may want 0.001.",
    )
    max_f1_drop: float = Field(
        0.05,
        ge=0,
        le=1,
        description="How far the F1 of any class may fall below the champion's, beyond its 95% interval.",
    )
    max_ece_rise: float = Field(
        0.05, ge=0, le=1, description="How far the expected calibration error may rise above the champion's."
    )


class Comparison(BaseModel):
    """A candidate beside the champion, and what follows.

    `gain` is in test accuracy (0 to 1), the counts are of test images that only one of the two gets right, `p` is
    McNemar's. All of them are None or 0 when there was no champion to compare with.
    """

    model_config = ConfigDict(frozen=True)

    champion: str | None = None
    champion_accuracy: float | None = None
    gain: float | None = None
    only_champion: int = 0
    only_candidate: int = 0
    p: float | None = None
    promoted: bool
    reasons: list[str]


def shown_p(p: float, digits: int = 2) -> str:
    """A p-value as people read it."""
    return f"p = {p:.{digits}g}" if p >= SMALLEST_P else f"p < {SMALLEST_P:g}"


def first(config: PromoteConfig) -> Comparison:
    """What is said of a candidate when there is no champion."""
    if not config.promote:
        return Comparison(promoted=False, reasons=["promote is off for this run"])
    return Comparison(promoted=True, reasons=["there was no champion before"])


def incomparable(champion: str, why: str) -> Comparison:
    """What is said of a candidate that cannot be held against the champion."""
    return Comparison(champion=champion, promoted=False, reasons=[f"{why}, so promote it by hand if it should be"])


def compare(
    config: PromoteConfig, champion: str, old: Verdict, new: Verdict, only_champion: int, only_candidate: int
) -> Comparison:
    """Hold a candidate's verdict against that of the champion, on the same test images.

    Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", 1947, in
    its exact form.
    """
    gain = (only_candidate - only_champion) / new.images
    p = mcnemar(only_champion, only_candidate)
    reasons = []
    if not config.promote:
        reasons.append("promote is off for this run")
    if gain <= 0:
        fewer = only_champion - only_candidate
        reasons.append(f"it recognises {f'{fewer} images fewer than' if fewer else 'as many images as'} the champion")
    elif gain < config.min_gain:
        reasons.append(f"it gains {gain:.4f} and min_gain is {config.min_gain:g}")
    if gain > 0 and p > config.max_p:
        few = mcnemar(0, old.images - old.correct) > config.max_p
        reasons.append(
            f"such a gain comes by chance with {shown_p(p, 3)}, and max_p is {config.max_p:g}"
            f"{', which no model can reach where the champion has so few images wrong' * few}"
        )
    for before, after in zip(old.classes, new.classes, strict=True):
        if before.f1 - after.f1 > config.max_f1_drop and before.f1 > after.f1_interval.high:
            reasons.append(
                f"F1 of {after.name} falls from {before.f1:.3f} to {after.f1:.3f}, and max_f1_drop is "
                f"{config.max_f1_drop:g}"
            )
    if new.ece - old.ece > config.max_ece_rise:
        reasons.append(
            f"the calibration error rises from {old.ece:.3f} to {new.ece:.3f}, and max_ece_rise is "
            f"{config.max_ece_rise:g}"
        )
    promoted = not reasons
    return Comparison(
        champion=champion,
        champion_accuracy=old.accuracy,
        gain=gain,
        only_champion=only_champion,
        only_candidate=only_candidate,
        p=p,
        promoted=promoted,
        reasons=reasons or [f"it recognises {only_candidate - only_champion} images more, {shown_p(p)}"],
    )


def render_decision(model: str, comparison: Comparison) -> str:
    """The decision in a few lines of Markdown."""
    lines = [f"# {model}: {'a new champion' if comparison.promoted else 'the champion stays'}", ""]
    if comparison.gain is not None and comparison.p is not None:
        lines += [
            f"Held against {comparison.champion}: {comparison.gain:+.2%} of test accuracy; "
            f"{comparison.only_candidate} images are right in this one alone, {comparison.only_champion} in the "
            f"champion alone, {shown_p(comparison.p)}.",
            "",
        ]
    return "\n".join([*lines, *(f"- {reason}" for reason in comparison.reasons), ""])
