"""A job on two processes of the CPU with the tiny model of the trainer's tests, for the tests of `finetune run`."""

from __future__ import annotations

from typing import Any

from tests.trainer import tiny


def job_document(name: str, **training: Any) -> dict[str, Any]:
    """Return the document of the job ``name``. ``training`` replaces fields of `spec.training`."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"s3": {"uri": "s3://finetune/models/tiny"}},
            "dataset": {
                "train": {"s3": {"uri": "s3://finetune/data/train.jsonl"}},
                "validation": {"s3": {"uri": "s3://finetune/data/validation.jsonl"}},
                "format": {
                    "promptCompletion": {
                        "promptField": "question",
                        "completionField": "reply",
                        "template": tiny.TEMPLATE,
                    }
                },
                "maxLength": 64,
            },
            "method": "LoRA",
            "lora": {"rank": 4, "alpha": 8, "dropout": "0.1"},
            "training": {
                "learningRate": "1e-3",
                "maxSteps": 60,
                "globalBatchSize": 6,
                "precision": "fp32",
                **training,
            },
            "evaluation": {"everySteps": 20},
            "resources": {
                "nodes": 2,
                "gpusPerNode": 0,
                "device": "CPU",
                "cpu": "900m",
                "memory": "6Gi",
                "sharedMemory": "256Mi",
            },
            # Nobody answers at this address, so a training that needed the object store would fail.
            "storage": {
                "uri": "s3://finetune/runs",
                "endpoint": "http://127.0.0.1:9",
                "credentialsSecretRef": {"name": "storage-credentials"},
                "checkpoint": {"everySteps": 4, "keepLast": 3},
            },
        },
    }
