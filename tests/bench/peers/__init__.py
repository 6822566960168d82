"""The trainer against what people would use instead: transformers' Trainer with peft, and trl's SFTTrainer.

Each contender is a program of its own that trains the same weights on the same rows and leaves one JSON file
(`Measured`); `compare` runs them in turns and prints ratios.
"""
