"""What the CLI says about job files without a cluster: `finetune validate` and `finetune plan`.

The YAML parser that knows the line of every field belongs here too.
"""
