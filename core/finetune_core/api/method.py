"""`method` and `lora`: whether adapters or all parameters are trained, and the shape of the adapters."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import SET, UNIQUE, ApiModel, DecimalString, cel


class Method(StrEnum):
    """What is trained: low-rank adapters while the model's own weights stay as they are, or every parameter."""

    LORA = "LoRA"
    FULL = "Full"


Quantization = Literal["NF4"]
"""How the linear layers of the base model are held in memory. NF4 is the 4-bit NormalFloat of QLoRA."""


DEFAULT_RANK = 8
"""Rank of new adapters where the job sets none."""
DEFAULT_ALPHA = 16
"""Scale of new adapters where the job sets none."""


class LoRASpec(ApiModel):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685). Only with `method: LoRA`."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("double(self.dropout) < 1.0", "`dropout` must be at least 0 and less than 1"),
            (
                "!has(self.loraPlusRatio) || double(self.loraPlusRatio) >= 1.0",
                "`loraPlusRatio` must be at least 1",
            ),
        )
    )

    rank: Annotated[int, Field(ge=1, le=512)] | None = None
    """Rank of each adapter. A higher rank trains more parameters. Absent: 8, or the rank of the adapter that
    `model.adapter` continues."""
    alpha: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Scale of the adapters: the low-rank update is multiplied by alpha / rank, or by alpha / √rank with `rsLoRA`.
    Absent: 16, or the alpha of the adapter that `model.adapter` continues."""
    dropout: DecimalString = "0"
    """Dropout probability on the input of each adapter, from 0 to less than 1, for example `"0.05"`. Adapters of
    embeddings have no dropout. Must be 0 where the weights of experts get an adapter, or the weights of other modules
    that peft can't adapt as a whole, because peft has no dropout for such weights."""
    rs_lora: Annotated[bool | None, Field(alias="rsLoRA")] = None
    """Whether the low-rank update is multiplied by alpha / √rank (rank-stabilized LoRA, Kalajdzievski 2023, arXiv
    2312.03732), which suits ranks above about 32. Absent: false, or as in the adapter that `model.adapter`
    continues."""
    do_ra: Annotated[bool | None, Field(alias="doRA")] = None
    """Whether each adapter also trains one norm for each output of its layer: the norm of the weights that make up this
    output (DoRA, Liu et al. 2024, arXiv 2402.09353). DoRA takes more time and memory. Must not be true where the
    weights of experts get an adapter, or the weights of other modules that peft can't adapt as a whole, because peft
    has no DoRA for such weights. Absent: false, or as in the adapter that `model.adapter` continues."""
    lora_plus_ratio: DecimalString | None = None
    """Learning rate of the matrices B of the adapters, and of the norms of DoRA, as a multiple of
    `training.learningRate`, for example `"16"` (LoRA+, Hayou et al. 2024, arXiv 2402.12354). The matrices B of adapters
    of embeddings are an exception: they are trained at `training.learningRate`. Absent: everything is trained at the
    same rate."""
    quantization: Quantization | None = None
    """NF4: bitsandbytes holds the linear layers of the base model in 4 bits, also quantizes the scales of the 4-bit
    weights (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), and computes in `training.precision`. The weights of these
    layers take about a quarter of the memory that they would take in bf16, and a step takes longer. Embeddings and
    output head stay as they are, as do layers whose weights the code of the model reads itself. Only with `zeroStage`
    1, 2 or Auto, with `storage.artifact` Adapter, with models without experts, and where peft can adapt every adapted
    module as a whole. Absent: the base model is not quantized."""
    target_modules: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=64, json_schema_extra=SET), UNIQUE
    ] = []
    r"""Which modules get an adapter. An entry is the name of a module or of an expert weight, or the end of such names,
    for example `q_proj` or `experts.down_proj`; or a regular expression (RE2) that fits whole names, for example
    `model\.layers\.[0-7]\..*`; or `all-linear`, which stands for all linear layers and experts, without the output
    head and without routers. Any other entry with a character that is no letter, no digit, no `_` and no `.` is a
    regular expression. Empty: `all-linear` and, with `model.addedTokens`, also the input embedding and the output head;
    or the modules of the adapter that `model.adapter` continues. Only what a text goes through gets an adapter, so
    never a vision or audio tower. A router gets an adapter only where an entry is its name, or a regular expression
    that fits nothing but routers."""

    @property
    def only_for_modules(self) -> tuple[str, str] | None:
        """The first field that is set to what peft has for whole modules only, and the value that the field must have
        where a parameter gets an adapter, such as the weights of experts. None where no field is."""
        if float(self.dropout) > 0:
            return "dropout", "0"
        return ("doRA", "false") if self.do_ra else None
