"""The training engines: DeepSpeed and its configuration, and the plain engine of one process; the training state as
safetensors; checks of a loaded model.

Decisions about training, such as the learning rate, belong in `decisions/`, and the loss in `loss/`.
"""
