"""How a step is computed: the batch, the optimizer, precision and layout. `orchestrator` comes here through
`model.config`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from model.sections import BelowOne, Count, Positive, Scheduled, Section, constant


class Optim(Section):
    """AdamW and the batch. A rank's micro-batch holds whole groups, so any layout makes the same draws."""

    batch_size: PositiveInt = Field(description="images a step, over all processes")
    group_size: PositiveInt = Field(description="consecutive images that share masks, drop path and RoPE draws")
    accumulate: PositiveInt = Field(1, description="micro-batches a step")
    micro_batch: PositiveInt | None = Field(
        None, description="most images of a process at once: instead of `accumulate`, as many micro-batches as it takes"
    )
    lr: Scheduled
    lr_scaling: Literal["none", "linear_256", "sqrt_wrt_1024"] = "none"
    weight_decay: Scheduled = constant(0.04)
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    clip: Positive | None = Field(3.0, description="gradient norm of backbone and of each head, apart")
    clip_each: Literal["network", "parameter"] = Field("network", description="parameter: each tensor apart, as v1")
    layer_decay: Positive = Field(1.0, description="learning rate of a block over the next one's")
    patch_embed_lr: Positive = Field(1.0, description="multiplier for the patch embedding")
    freeze_last_layer_steps: Count = Field(0, description="steps for which the prototypes stay as they are")

    @model_validator(mode="after")
    def _groups(self) -> Optim:
        if self.batch_size % (self.group_size * self.accumulate):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of group_size x accumulate "
                f"({self.group_size} x {self.accumulate} = {self.group_size * self.accumulate})"
            )
        if self.micro_batch is not None and (self.accumulate > 1 or self.micro_batch < self.group_size):
            raise ValueError(
                f"micro_batch {self.micro_batch} goes without accumulate, and holds a whole group ({self.group_size})"
            )
        return self

    def worlds(self) -> list[int]:
        """The numbers of processes among which whole groups can be dealt evenly."""
        groups = self.batch_size // (self.group_size * self.accumulate)
        return [processes for processes in range(1, groups + 1) if groups % processes == 0]

    def micro_batches(self, processes: int) -> int:
        """Into how many equal parts each of so many processes cuts its share of the batch, all of them whole groups.

        Raises ValueError if there is no such number.
        """
        groups, rest = divmod(self.batch_size, self.group_size * processes)
        if rest or (self.micro_batch is None and groups % self.accumulate):
            raise ValueError(
                f"{processes} processes cannot share batch_size {self.batch_size} in whole groups of {self.group_size}"
                + (f" and {self.accumulate} micro-batches" if self.accumulate > 1 else "")
            )
        if self.micro_batch is None:
            return self.accumulate
        most = self.micro_batch // self.group_size
        return next(parts for parts in range(1, groups + 1) if groups % parts == 0 and groups // parts <= most)


FP8_MULTIPLE = 16
"""Both widths of a weight must be one, or its product is not to be had in fp8."""


class Precision(Section):
    compute: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32",
        description="dtype of the products; losses and updates stay fp32. fp64: of everything, to compare layouts",
    )
    fp8: Literal["none", "blocks"] = Field("none", description="blocks: products of the blocks' linear layers in e4m3")

    @property
    def products(self) -> Literal["fp32", "bf16"]:
        """What the networks' products are rounded to; "fp32" rounds nothing, of fp64 either."""
        return "bf16" if self.compute == "bf16" else "fp32"

    @model_validator(mode="after")
    def _of_fp8(self) -> Precision:
        if self.fp8 != "none" and self.compute != "bf16":
            raise ValueError(f"fp8: {self.fp8} goes with compute: bf16, in which everything else is done")
        return self


class Parallel(Section):
    shard: Literal["none", "fsdp", "hsdp"] = Field(
        "none", description="weights, moments and teachers: whole in every process, cut over all, or over `shard_size`"
    )
    shard_size: PositiveInt | None = Field(None, description="hsdp: processes that share one copy; null: of a node")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="computed again in the backward pass: nothing, all but products and attention, everything"
    )
    compile: bool = Field(False, description="torch.compile for each block")

    @model_validator(mode="after")
    def _of_hsdp(self) -> Parallel:
        if self.shard_size is not None and self.shard != "hsdp":
            raise ValueError("shard_size goes with `shard: hsdp`")
        return self
