"""`method` and `lora`: whether adapters or all parameters are trained, and the shape of the adapters."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_core.api.base import SET, UNIQUE, ApiModel, DecimalString, cel


class Method(StrEnum):
    """What is trained: low-rank adapters while the model's own weights stay as they are, or every parameter."""

    LORA = "LoRA"
    FULL = "Full"


class LoRASpec(ApiModel):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685). Only with `method: LoRA`."""

    model_config = ConfigDict(
        json_schema_extra=cel(("double(self.dropout) < 1.0", "`dropout` must be at least 0 and less than 1"))
    )

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    """Rank of each adapter. A higher rank trains more parameters."""
    alpha: Annotated[int, Field(ge=1, le=1024)] = 16
    """Scale of the adapters: the low-rank update is multiplied by alpha / rank."""
    dropout: DecimalString = "0"
    """Dropout probability on the input of each adapter, from 0 to less than 1, for example `"0.05"`."""
    target_modules: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=64, json_schema_extra=SET), UNIQUE
    ] = []
    """Names of the modules that get an adapter, for example `["q_proj", "v_proj"]`. Empty: all linear layers of the
    decoder and, with `model.addedTokens`, also the input embedding and the output head."""
