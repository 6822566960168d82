"""The contender (compared program) of this project: the trainer's own training loop with DeepSpeed. The rows of each
global batch are packed into sequences.

    python -m tests.bench.peers.ours WORKLOAD OUT STORE_ENDPOINT CREDENTIALS
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from finetune_core.contract import Identity, RunConfig
from finetune_trainer.pod.outcomes import WorkerStatus
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import Paths
from finetune_trainer.ranks import process
from finetune_trainer.storage.step_log import StepRow
from tests.bench.peers.workload import LORA_ALPHA, LORA_RANK, TEMPLATE, Clock, Workload
from tests.trainer.objectstore import BUCKET, free_port


def run_file(workload: Workload, endpoint: str, name: str) -> RunConfig:
    """Return the run file (all settings of a trainer's run) of a LoRA run that makes the same updates as
    `padded.py`."""
    source = {"volume": {"claimName": "bench", "path": "rows"}}
    return RunConfig.model_validate(
        {
            "world": {"nodes": 1, "processesPerNode": 1, "device": "CPU"},
            "model": {"volume": {"claimName": "bench", "path": "model"}},
            "dataset": {
                "train": source,
                "format": {
                    "promptCompletion": {"promptField": "question", "completionField": "answer", "template": TEMPLATE}
                },
                "maxLength": workload.max_length,
                "packing": True,
            },
            "method": "LoRA",
            "lora": {"rank": LORA_RANK, "alpha": LORA_ALPHA},
            "optimization": {
                "learningRate": workload.learning_rate,
                "maxSteps": workload.updates,
                "globalBatchSize": workload.batch,
                "microBatchSize": workload.micro_batch,
                "schedule": "Constant",
                "warmupSteps": 0,
                "weightDecay": 0,
                "gradientClipping": 1.0,
                "precision": "fp32",
                "gradientCheckpointing": False,
                "seed": workload.seed,
                "zeroStage": 1,
            },
            "evaluation": {"artifactFrom": "Last"},
            "storage": {
                "uri": f"s3://{BUCKET}/bench/{name}",
                "endpoint": endpoint,
                "region": "us-east-1",
                "checkpointEverySteps": 1_000_000,
                "keepLast": 1,
            },
        }
    )


def main() -> None:
    """Train on the workload in the file WORKLOAD, and write the figures to the file OUT."""
    workload = Workload.model_validate_json(Path(sys.argv[1]).read_text())
    out, endpoint, credentials = Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(workload.threads),
    }
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        process.prepare_environment(scratch)
        import torch

        from finetune_trainer.ranks.gang import Gang
        from finetune_trainer.reporting.progress import Progress
        from finetune_trainer.train import train

        torch.set_num_threads(workload.threads)
        clock, rows = Clock(), list[StepRow]()

        class Timed(Progress):
            def finished_step(self, row: StepRow, *, updates: int) -> None:
                clock.update_ended()
                rows.append(row)
                super().finished_step(row, updates=updates)

        identity = Identity(namespace="b", name="b", uid="b", attempt=1, pod_name="p", pod_uid="p", node_rank=0)
        plan = WorkerPlan(
            paths=Paths(credentials=credentials, scratch=scratch),
            identity=identity,
            config=run_file(workload, endpoint, out.stem),
            inputs=Inputs(model=workload.model, train=workload.rows, validation=None),
            folder=scratch / "run",
        )
        plan.folder.mkdir()
        gang = Gang(device=torch.device("cpu"))
        train(plan, gang, Timed(pod_uid="p", ranks=1, reporter=None), WorkerStatus())
        gang.final_barrier()
    tokens = [(row.tokens, row.real_tokens) for row in rows]
    out.write_text(clock.measured(tokens, [row.loss for row in rows if row.loss is not None]).model_dump_json())
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
