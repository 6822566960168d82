"""Finds the API server: by a kubeconfig, as kubectl does, or by the service account of the pod that the program runs
in.

The commands call `load_client`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config
from kubernetes.config import kube_config

from finetune_core.errors import UserError

SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
DEFAULT_KUBECONFIG = "~/.kube/config"
CONTEXT_OPTION = "--context"
NAMES_SHOWN = 20
"""Largest number of contexts that a message lists."""

NOT_A_KUBECONFIG = (TypeError, AttributeError, KeyError, ValueError)
"""Exceptions that the library `kubernetes` raises for a kubeconfig whose YAML has an unexpected structure."""


def load_client(context: str | None = None) -> tuple[client.ApiClient, str]:
    """Return a client of the API server and the default namespace.

    The client is configured by the kubeconfig (KUBECONFIG or ~/.kube/config) and its context ``context``, or its
    current context where ``context`` is None. Without a kubeconfig, the client is configured by the pod's service
    account. Raises UserError where the kubeconfig can't be read or has no such context, and where neither of the two
    exists.
    """
    files = os.environ.get("KUBECONFIG") or DEFAULT_KUBECONFIG
    # `kubernetes.config.load_config` is not used, because it prints a sentence of its own where no kubeconfig exists.
    if not any(Path(file).expanduser().exists() for file in files.split(os.pathsep) if file):
        return _in_pod(files, context)
    settings = client.Configuration()
    try:
        contexts, current = _contexts(files)
        chosen = context or current
        if chosen not in contexts:
            raise _unknown(context, current, contexts)
        config.load_kube_config(config_file=files, context=chosen, client_configuration=settings)
        namespace = str(contexts[chosen].get("namespace") or "default")
    except (config.ConfigException, OSError, yaml.YAMLError, *NOT_A_KUBECONFIG) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            "kubeconfig", f"cannot be loaded ({reason}); correct {files}, or set KUBECONFIG to another file"
        ) from error
    return client.ApiClient(settings), namespace


def _in_pod(files: str, context: str | None) -> tuple[client.ApiClient, str]:
    settings = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise UserError(
            "kubeconfig",
            f"cannot be loaded (there is no file {files}); set KUBECONFIG to a kubeconfig, or create"
            f" {DEFAULT_KUBECONFIG}",
        ) from error
    if context is not None:
        raise UserError(CONTEXT_OPTION, f"needs a kubeconfig, and there is no file {files}; set KUBECONFIG to one")
    found = SERVICE_ACCOUNT_NAMESPACE
    return client.ApiClient(settings), found.read_text().strip() if found.exists() else "default"


def _contexts(files: str) -> tuple[dict[str, Mapping[str, Any]], str]:
    """Return the contexts in the kubeconfig ``files`` (paths with `:` between them) by name, and the name of the
    current context, which is empty where there is none."""
    merged = kube_config.KubeConfigMerger(files).config
    if merged is None:
        raise ValueError("the file is empty")
    found = {str(node.value["name"]): node.value.get("context") or {} for node in merged.value["contexts"]}
    return found, str(merged.value.get("current-context") or "")


def _unknown(context: str | None, current: str, contexts: Mapping[str, Any]) -> UserError:
    names = sorted(contexts)
    listed = ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "") if names else "none"
    if context is not None:
        return UserError(CONTEXT_OPTION, f"must name a context of the kubeconfig ({listed}), and is {context}")
    wrong = f"has no context {current}, which is its current one" if current else "has no current context"
    return UserError("kubeconfig", f"cannot be loaded ({wrong}); choose one with `{CONTEXT_OPTION}` ({listed})")
