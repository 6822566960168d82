"""The type of Kubernetes objects as dictionaries, shared by the client and by the modules that build objects.

The module imports nothing, so that pure modules can use the type without importing the client.
"""

from __future__ import annotations

from typing import Any

Manifest = dict[str, Any]
"""A Kubernetes object in the JSON form of the API, for example ``{"apiVersion": "v1", "kind": "Pod", ...}``."""
