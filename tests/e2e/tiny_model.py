"""Make a Llama model of about 250,000 parameters with random weights. Tests that need no useful model use it, so that
their jobs run within seconds.

The model's folder has the files that `model.s3` of a job needs. The tokenizer works on bytes, so that it accepts any
text.
"""

from __future__ import annotations

from pathlib import Path

from examples.demo import steps
from examples.trails.generate import generate
from tests.cluster import Cluster

TINY_MODEL = f"s3://{steps.BUCKET}/models/tiny"
VOCABULARY = 320


def put_tiny_model_and_rows(cluster: Cluster, folder: Path) -> None:
    """Create the tiny model in ``folder`` and upload it to `TINY_MODEL`. Generate training and validation rows and
    upload them to the places that examples/quickstart.yaml names. Also create the bucket, and the Service through which
    pods reach the object store under the host name in examples/quickstart.yaml."""
    steps.make_bucket(cluster)
    steps.name_object_store(cluster)
    steps.put_base_model(cluster, make_tiny_model(folder), "models/tiny")
    steps.put_rows(cluster, generate())


def make_tiny_model(folder: Path) -> Path:
    """Write the model and its tokenizer into ``folder``, and return ``folder``. The weights are random, but the same in
    every call."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, "<pad>": 1, **{character: number + 2 for number, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder
