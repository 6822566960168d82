"""The options of `finetune plan`. `jobfiles/plan.py` does the work."""

from __future__ import annotations

from pathlib import Path

import shtab

from finetune_cli.commands.options import Commands, add_command, add_endpoint, price, whole_number
from finetune_cli.jobfiles.plan import plan_file

MOST_ROWS = 10**15
"""Largest number of rows that `finetune plan` takes."""

EXAMPLES = """\
examples:
  finetune plan job.yaml --model-config config.json
  finetune plan job.yaml --model-config config.json --gpu H100-80GB --rows 7473 --price 2.5
  finetune plan cpu-job.yaml --model-config config.json --gpu L4
  finetune plan job.yaml --model-config config.json --gpu-table gpus.yaml --gpu MI300X
  finetune plan job.yaml --model-config config.json -o json | jq -r '.changes[].lines[]'
  kubectl get ftj my-job -o yaml | finetune plan - --model-config config.json

The configuration of the base model comes from --model-config, a file or the folder of a model. Where the model is in
the job's bucket, the command reads it there, with the access key in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
The plan shows choices and changes as YAML: merge these lines into the job. With -o json, each line has the path of its
field, such as `spec.training.microBatchSize: 2`.
A --gpu-table is a list of objects with name, memoryGibibytes, teraFlops, memoryBandwidth and linkBandwidth (GB/s).

exit code: 0 the job fits, 1 it does not, 2 it cannot be planned
"""


def add_plan(commands: Commands) -> None:
    """Add `finetune plan` to the command line."""
    command = add_command(
        commands,
        "plan",
        "say whether a job fits its GPUs, how fast it is, and what to change",
        EXAMPLES,
        plan_file,
        description="Plan the memory, the speed and the cost of a job. Needs neither a cluster nor a GPU.",
    )
    file = command.add_argument("file", metavar="FILE", help="YAML or JSON file with one job; - for standard input")
    model = command.add_argument(
        "--model-config", type=Path, metavar="PATH", help="config.json of the base model, or its folder"
    )
    command.add_argument("--gpu", metavar="TYPE", help="type of GPU, such as H100-80GB (default: resources.gpuProduct)")
    table = command.add_argument(
        "--gpu-table", type=Path, metavar="FILE", help="YAML or JSON file with more types of GPUs"
    )
    for option in (file, model, table):
        option.complete = shtab.FILE  # type: ignore[attr-defined]
    command.add_argument(
        "--price",
        type=price,
        metavar="PRICE",
        help="price of one GPU for one hour, in any currency; the plan shows the cost",
    )
    command.add_argument(
        "--rows", type=whole_number(1, MOST_ROWS), metavar="N", help="number of training rows, for hours and cost"
    )
    add_endpoint(command)
    command.add_argument("-o", "--output", choices=("text", "json", "yaml"), default="text", help="json for pipelines")
