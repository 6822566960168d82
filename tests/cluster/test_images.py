"""An image is built from a Dockerfile, but only once for the same content. The kubelet can pull the image, and a pod
can run it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import Cluster, unusable_because, wait_for
from tests.cluster.images import Image, content_key, copied_sources, ensure

needs_root = pytest.mark.skipif(unusable_because() is not None, reason=str(unusable_because()))

DOCKERFILE = """ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
RUN python3 -m venv --without-pip /opt/venv
COPY program.py /opt/program.py
USER 65532:65532
ENTRYPOINT ["/opt/venv/bin/python", "/opt/program.py"]
"""


@pytest.fixture
def image(tmp_path: Path) -> Image:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    (tmp_path / "program.py").write_text("print('first')")
    return Image("finetune-test", tmp_path / "Dockerfile", tmp_path)


def test_the_content_decides_about_the_name(image: Image) -> None:
    before = content_key(image)
    (image.context / "unrelated.txt").write_text("not copied")
    assert content_key(image) == before
    (image.context / "program.py").write_text("print('second')")
    assert content_key(image) != before


def test_sources_are_what_is_copied_from_the_context() -> None:
    text = "ARG BASE\nFROM ${BASE} AS one\nCOPY --chown=1:1 a \\\n  b/ /to/\nCOPY --from=one /x /y\n"
    text += "ADD c.tar /\nRUN echo COPY d /d\n"
    assert copied_sources(text) == ["a", "b/", "c.tar"]


@pytest.mark.cluster
@needs_root
def test_a_built_image_is_pulled_and_run_as_nobody(cluster: Cluster, image: Image) -> None:
    (image.context / "program.py").write_text(
        "import os, ssl; print(os.getuid(), ssl.create_default_context().cert_store_stats()['x509_ca'] > 99)"
    )
    reference = ensure(image)
    assert ensure(image) == reference
    cluster.kubectl("run", "built", f"--image={reference}", "--restart=Never")
    wait_for(
        "the pod to succeed",
        lambda: cluster.get("pod", "built")["status"]["phase"] == "Succeeded",
        60,
        evidence=lambda: cluster.kubectl("describe", "pod", "built"),
    )
    assert cluster.kubectl("logs", "built").split() == ["65532", "True"]
    cluster.kubectl("delete", "pod", "built", "--wait=false")
