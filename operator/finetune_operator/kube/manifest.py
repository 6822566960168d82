"""The type `Manifest` of a Kubernetes object as a dictionary. The client and the modules that build objects share it.

It has a module of its own, so that pure modules can use the type without importing the client.
"""

from __future__ import annotations

from typing import Any

Manifest = dict[str, Any]
"""A Kubernetes object in the JSON form of the API, for example ``{"apiVersion": "v1", "kind": "Pod", ...}``."""
