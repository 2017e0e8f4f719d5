"""What a phase is told: pydantic models, free of torch, validated before anything is queued.

The job spec (`orchestrator.spec`) is made of these sections; an attempt is handed one phase of it, resolved.
Defaults are DINOv3's published values (arXiv 2508.10104 and its released configurations) unless a line says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, TypeAdapter, model_validator

from model.architectures import ARCHITECTURES
from model.data_section import (
    DATASET as DATASET,
    NORMALISATIONS as NORMALISATIONS,
    RGB as RGB,
    Data as Data,
    Jump as Jump,
    Statistics as Statistics,
)
from model.engine_section import (
    FP8_MULTIPLE as FP8_MULTIPLE,
    Optim as Optim,
    Parallel as Parallel,
    Precision as Precision,
)
from model.sections import (
    BelowOne as BelowOne,
    Count as Count,
    Fraction as Fraction,
    NonNegative as NonNegative,
    Positive as Positive,
    Rgb as Rgb,
    Schedule as Schedule,
    Scheduled as Scheduled,
    Section as Section,
    constant as constant,
    read as read,
)

# --- the networks -----------------------------------------------------------------------------------------------------


class Backbone(Section):
    """A vision transformer. `arch` names a released one; the other fields override it."""

    arch: Literal[tuple(ARCHITECTURES)] = Field(description="a released architecture, or `custom`")  # type: ignore[valid-type]
    dim: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    patch_size: PositiveInt = 16
    channels: PositiveInt = 3
    registers: Count = Field(4, description="register (storage) tokens")
    mask_token: bool = Field(True, description="a learnt token that hides patches; iBOT needs it")
    ffn: Literal["mlp", "swiglu", "swiglu_fused"] = Field("mlp", description="fused: w1 and w2 in one matrix, as in v2")
    ffn_ratio: Positive = 4.0
    ffn_align: PositiveInt = Field(8, description="SwiGLU's hidden width is rounded up to a multiple of this")
    qkv_bias: bool = True
    mask_k_bias: bool = Field(True, description="keep the key bias at zero; it changes no attention")
    layer_scale: Positive | None = Field(1e-5, description="initial LayerScale; null for none")
    norm_eps: Positive = 1e-5
    untie_local_cls_norm: bool = Field(False, description="a norm of its own for the CLS of local crops")
    drop_path: Fraction = 0.0
    drop_path_depth: Literal["uniform", "linear"] = Field("uniform", description="linear: from 0 in the first block")
    token_std: Positive = Field(0.02, description="of the CLS token and the registers at the beginning")
    positions: Literal["rope", "learned"] = "rope"
    position_grid: PositiveInt | None = Field(None, description="learned: side of the grid of positions, in patches")
    position_offset: NonNegative = Field(0.1, description="learned: added to a side in patches when interpolating")
    rope_base: Positive = 100.0
    rope_rescale: Annotated[float, Field(ge=1.0)] | None = Field(None, description="training augmentation, e.g. 2.0")
    rope_jitter: Annotated[float, Field(ge=1.0)] | None = None
    rope_shift: NonNegative | None = None
    rope_dtype: Literal["fp32", "bf16"] = "fp32"
    rope_per_block: bool = Field(False, description="draw the training augmentation anew in every block")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {**ARCHITECTURES.get(str(values.get("arch")), {}), **values}

    @model_validator(mode="after")
    def _fits(self) -> Backbone:
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise ValueError(
                f"dim {self.dim} over {self.heads} heads: a head's width must be whole and a multiple of 4, "
                "as axial RoPE turns pairs on two axes"
            )
        if (self.positions == "learned") != (self.position_grid is not None):
            raise ValueError("position_grid goes with `positions: learned`, and only with it")
        return self


class Head(Section):
    """A projection head: an MLP of `layers` to `bottleneck`, L2 normalised, then one weight per prototype."""

    prototypes: PositiveInt
    hidden: PositiveInt
    bottleneck: PositiveInt
    layers: PositiveInt = 3
    weight_norm: Literal["none", "frozen", "learned"] = Field(
        "none", description="of the last layer (v1, v2): each prototype has a length, which is 1 or learnt"
    )


class Model(Section):
    """The networks that all phases share."""

    backbone: Backbone
    dino_head: Head
    ibot_head: Head | Literal["tied"] | None = Field(
        None, description="of the masked patches; `tied`: the DINO head; null: none, and no iBOT loss"
    )

    @property
    def heads(self) -> dict[str, Head]:
        """Those that have weights of their own, by name."""
        own = {"dino_head": self.dino_head}
        return {**own, "ibot_head": self.ibot_head} if isinstance(self.ibot_head, Head) else own


# --- data -------------------------------------------------------------------------------------------------------------


class Augment(Section):
    """What is done to a crop, each with its probability or strength (parity with the papers: appendix of DINOv3)."""

    horizontal_flip: Fraction = 0.5
    jitter: Fraction = 0.8
    brightness: NonNegative = 0.4
    contrast: NonNegative = 0.4
    saturation: NonNegative = 0.2
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    grayscale: Fraction = 0.2
    blur_global_1: Fraction = 1.0
    blur_global_2: Fraction = 0.1
    blur_local: Fraction = 0.5
    solarize_global_2: Fraction = 0.2


class Resolution(Section):
    """Sizes in pixels, drawn per step with probability proportional to `ratio`."""

    global_size: PositiveInt
    local_size: PositiveInt
    gram_size: PositiveInt | None = Field(None, description="side of the Gram teacher's view; `global_size` if absent")
    ratio: Positive = 1.0


class Crops(Section):
    """Multi-crop: two global crops, `local_count` local ones."""

    resolutions: Annotated[list[Resolution], Field(min_length=1)]
    local_count: Count = 8
    global_scale: tuple[Fraction, Fraction] = (0.32, 1.0)
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.32)
    aspect: tuple[Positive, Positive] = (0.75, 4 / 3)


# --- losses -----------------------------------------------------------------------------------------------------------


class Dino(Section):
    weight: NonNegative = 1.0
    local_weight: Scheduled = constant(1.0)
    student_temp: Positive = 0.1
    teacher_temp: Scheduled = constant(0.07)


class Ibot(Section):
    weight: NonNegative = Field(1.0, description="0: nothing is masked either")
    mask_probability: Fraction = Field(0.5, description="share of global crops that are masked")
    mask_ratio: tuple[Fraction, Fraction] = (0.1, 0.5)


class Koleo(Section):
    weight: NonNegative = 0.1
    group_size: PositiveInt | None = Field(
        None,
        description="images of a neighbourhood: a multiple of optim.group_size, or that if absent",
    )


class Gram(Section):
    """Gram anchoring (section 4 of the DINOv3 paper)."""

    weight: Scheduled = constant(2.0)
    refresh_every: Count = Field(0, description="steps after which the Gram teacher becomes the EMA teacher; 0: never")
    refresh_most: Count = Field(0, description="refreshes after which there are no more")
    compute: Literal["fp32", "bf16"] | None = Field(
        None, description="dtype of the Gram teacher's products; null: precision.compute"
    )
    img_level: bool = Field(True, description="similarities within a crop; false: across all crops of a group")
    remove_neg: bool = Field(False, description="negative similarities count as zero")
    remove_only_teacher_neg: bool = Field(False, description="the teacher's, and the student's where both are negative")

    @model_validator(mode="after")
    def _one_of_both(self) -> Gram:
        if self.remove_neg and self.remove_only_teacher_neg:
            raise ValueError("remove_neg and remove_only_teacher_neg exclude each other")
        return self


class Losses(Section):
    dino: Dino = Dino()
    ibot: Ibot = Ibot()
    koleo: Koleo = Koleo()
    gram: Gram = Gram()
    centering: Literal["sinkhorn", "centering", "none"] = Field(
        "sinkhorn",
        description="of the teacher's scores; `centering`: v1's moving mean; none: collapses",
    )
    center_momentum: Fraction = 0.9


# --- running ----------------------------------------------------------------------------------------------------------


class Resources(Section):
    nodes: PositiveInt = 1
    processes_per_node: PositiveInt = Field(1, description="one per GPU, or as many as the cores are worth")
    threads: PositiveInt = Field(1, description="CPU threads a process computes with")
    time_limit_minutes: PositiveInt | None = None
    min_nodes: PositiveInt | None = Field(
        None, description="after nodes were lost: go on with as few, the same global batch"
    )
    slurm: dict[str, Any] = Field({}, description="what this job has other than its cluster's `slurm` section")
    kubernetes: dict[str, Any] = Field({}, description="what it has other than its cluster's `kubernetes` section")


class Checkpoints(Section):
    every: PositiveInt | Literal["auto"] = Field(
        description="steps between two sealed checkpoints; auto: what loses the least time (docs/checkpoints.md)"
    )
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = Field(None, description="keep each checkpoint at a multiple of this")
    node_mtbf_hours: Positive | None = Field(
        None, description="auto: hours that one node runs from failure to failure; null: as the cluster's profile says"
    )
    upload_limit_mb_s: Positive | None = Field(
        None, description="MB (10^6 bytes) a second that each process writes of a checkpoint at most; null: no limit"
    )

    @model_validator(mode="after")
    def _auto(self) -> Checkpoints:
        if self.every == "auto" and self.node_mtbf_hours is None:
            raise ValueError(
                "every: auto needs node_mtbf_hours, here or in the cluster's profile, how often a node fails: Llama "
                "3's 16,384 H100 had 419 unexpected interruptions in 54 days (arXiv 2407.21783), which is 6,300 h for "
                "a node of 8"
            )
        return self


class Health(Section):
    stall_seconds: Positive = Field(600.0, description="no step for this long: the attempt is hung")
    notice_seconds: Positive = Field(60.0, description="time between the request to stop and the kill")
    non_finite_steps: PositiveInt = Field(3, description="consecutive non-finite losses that end the attempt")
    every: PositiveInt = Field(50, description="steps between two measurements of collapse (rank, entropy, prototypes)")


class Debug(Section):
    """What helps to find a fault; nothing here changes the training."""

    record_step: PositiveInt | None = Field(None, description="write this step down whole, for `dinoctl replay`")


class PhaseBase(Section):
    steps: PositiveInt
    data: Data
    optim: Optim
    precision: Precision = Precision()
    parallel: Parallel = Parallel()
    resources: Resources = Resources()
    checkpoints: Checkpoints
    health: Health = Health()
    debug: Debug = Debug()


class SslPhase(PhaseBase):
    """What pretrain, gram and highres have in common."""

    crops: Crops
    augment: Augment = Augment()
    losses: Losses = Losses()
    ema: Scheduled = constant(0.994)
    official_quirks: bool = Field(False, description="train as the released code does where it differs: docs/parity.md")

    @property
    def koleo_group(self) -> int:
        """Images among which KoLeo looks for a neighbour."""
        return self.losses.koleo.group_size or self.optim.group_size

    def koleo_fits(self, processes: int) -> bool:
        """Whether a KoLeo group is within a micro-batch, or made of whole processes' shares, not cut further."""
        parts = self.optim.micro_batches(processes)
        share = self.optim.batch_size // (processes * parts)
        within, over = share % self.koleo_group == 0, self.koleo_group % share == 0 and parts == 1
        return not self.losses.koleo.weight or within or over

    @model_validator(mode="after")
    def _koleo_groups(self) -> SslPhase:
        size, unit = self.koleo_group, self.optim.group_size
        if size % unit or self.optim.batch_size % size:
            raise ValueError(
                f"losses.koleo.group_size {size} must be a multiple of optim.group_size {unit} and divide "
                f"optim.batch_size {self.optim.batch_size}"
            )
        return self


class PretrainPhase(SslPhase):
    kind: Literal["pretrain"]
    init: str | None = Field(None, description="go on from this checkpoint's full training state")
    weights: str | None = Field(None, description="begin with this checkpoint's EMA teacher")


class GramPhase(SslPhase):
    kind: Literal["gram"]
    init: str | None = None
    weights: str | None = None
    gram_teacher: str = Field(description="an early checkpoint whose EMA teacher anchors the patch features")


class HighresPhase(SslPhase):
    kind: Literal["highres"]
    init: str | None = None
    weights: str | None = None
    gram_teacher: str


class TextTower(Section):
    """dino.txt's text tower (arXiv 2412.16334): causal, trained from scratch."""

    dim: PositiveInt = 1280
    depth: PositiveInt = 24
    heads: PositiveInt = 20
    ffn_ratio: Positive = 4.0
    context: PositiveInt = 77
    vocabulary: PositiveInt = 49408


class VisionHead(Section):
    """Blocks trained on top of the frozen tower; the output is CLS joined with the mean patch."""

    blocks: Count = 2
    drop_path: Fraction = 0.3


class TextPhase(PhaseBase):
    kind: Literal["text"]
    vision_tower: str = Field(description="the checkpoint whose EMA teacher's backbone is the frozen vision tower")
    without_captions: Literal["fail", "skip"] = Field(
        "fail", description="where no image has a caption: refuse the job, or leave this phase out and say so"
    )
    image_size: PositiveInt = 224
    embed_dim: PositiveInt = 2048
    text: TextTower = TextTower()
    head: VisionHead = VisionHead()


Phase = Annotated[PretrainPhase | GramPhase | HighresPhase | TextPhase, Field(discriminator="kind")]
AnyPhase = PretrainPhase | GramPhase | HighresPhase | TextPhase
PHASES: dict[str, type[PhaseBase]] = {
    "pretrain": PretrainPhase, "gram": GramPhase, "highres": HighresPhase, "text": TextPhase,
}  # fmt: skip
"""A new kind of phase is a row here and a file in objectives/."""


def read_phase(values: Mapping[str, Any]) -> AnyPhase:
    """A phase as an attempt's YAML holds it. Raises pydantic.ValidationError with every mistake."""
    return TypeAdapter[AnyPhase](Phase).validate_json(json.dumps(values))


class Evaluate(Section):
    """The table at the end: the trained backbone beside the same one untrained and trivial baselines."""

    split: Literal["validation", "test"] = "test"
    image_size: PositiveInt = 224
    batch_size: PositiveInt = 64
    probes: PositiveInt = Field(10, description="linear probes behind a score, each on a random half of the images")
    bootstrap: PositiveInt = Field(2000, description="resamples behind each confidence interval")
    pictures: Count = Field(8, description="images drawn as patch-PCA and attention heads")
    data: Data
    resources: Resources = Resources()
    health: Health = Health()
