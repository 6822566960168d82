"""Compare the trainer with the usual alternatives: transformers' Trainer with peft, and trl's SFTTrainer. Each
contender (compared program) runs in a process of its own. All contenders train the same base model with LoRA on the
same rows, and each writes one JSON file (`Measured`). `__main__.py` runs the contenders one after the other, in several
rounds, and prints ratios."""
