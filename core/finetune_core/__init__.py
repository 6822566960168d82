"""What operator, trainer and CLI share: the resource's models, the contract between operator and pods, and names.

It is light on purpose (pydantic only), because it is imported in every pod and in every command.
"""
