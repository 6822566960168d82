"""The training engine: DeepSpeed and its configuration, the training state as safetensors, checks of a loaded model.

Decisions about training, such as the learning rate, belong in `decisions/`, and the loss in `loss/`.
"""
