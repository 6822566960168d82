"""The type `Manifest` of a Kubernetes object as a dictionary, for the client and for the modules that build objects.

The type has a module of its own, so that pure modules can use the type without importing the client.
"""

from __future__ import annotations

from typing import Any

Manifest = dict[str, Any]
"""A Kubernetes object in the JSON form of the API, for example ``{"apiVersion": "v1", "kind": "Pod", ...}``."""
