"""What is trained: `method` and `lora`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_core.api.base import SET, UNIQUE, ApiModel, DecimalString, cel


class Method(StrEnum):
    """What is trained: low-rank adapters beside frozen weights, or every parameter."""

    LORA = "LoRA"
    FULL = "Full"


class LoRASpec(ApiModel):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685); only with `method: LoRA`."""

    model_config = ConfigDict(
        json_schema_extra=cel(("double(self.dropout) < 1.0", "`dropout` must be at least 0 and less than 1"))
    )

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    """Rank of each adapter."""
    alpha: Annotated[int, Field(ge=1, le=1024)] = 16
    """The update is scaled by alpha / rank."""
    dropout: DecimalString = "0"
    """Dropout on the adapter's input, from 0 to less than 1."""
    target_modules: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=64, json_schema_extra=SET), UNIQUE
    ] = []
    """Names of the modules that get an adapter; empty means all dense layers of the decoder, and both embeddings where
    `model.addedTokens` is set."""
