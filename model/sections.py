"""What every section of a spec is made of, and values that move with the step: the ground under `model.config`.

`orchestrator` imports these by way of `model.config`. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=0)]
Rgb = tuple[float, float, float]


class Section(BaseModel):
    """Base of every section: unknown keys, wrong types and infinities are refused, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def read(kind: type[S], values: Mapping[str, Any]) -> S:
    """`values`, as YAML gives them, as a section. Goes by way of JSON, where a list may be a tuple and nothing else
    is bent. Raises pydantic.ValidationError with every mistake."""
    return kind.model_validate_json(json.dumps(values))


# --- values that move with the step -----------------------------------------------------------------------------------


class Schedule(Section):
    """From `start` to `peak` in `warmup_steps`, then to `end` at the phase's last step (constant without `end`).

    Form v1 is DINO's and DINOv2's: the warm-up's last step is at `peak` already, and `end` would come a step too late.
    """

    start: float | None = Field(None, description="value at step 0; `peak` if absent")
    peak: float = Field(description="value after the warm-up")
    end: float | None = Field(None, description="value at the last step; `peak` if absent")
    warmup_steps: Count = 0
    warmup: Literal["linear", "cosine"] = "linear"
    decay: Literal["cosine", "linear"] = "cosine"
    form: Literal["v1", "v2"] = Field("v2", description="v2: DINOv3's, both ends are reached; v1: see above")
    hold_steps: PositiveInt = Field(1, description="moves only every so many steps (an epoch, say); form v1")

    @model_validator(mode="after")
    def _held(self) -> Schedule:
        if self.hold_steps > 1 and self.form != "v1":
            raise ValueError("hold_steps goes with `form: v1`")
        return self


def _constant(value: Any) -> Any:
    return {"peak": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


Scheduled = Annotated[Schedule, BeforeValidator(_constant)]
"""A schedule, or a plain number for one that stays the same."""


def constant(value: float) -> Schedule:
    return Schedule(peak=value)
