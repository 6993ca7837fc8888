"""The contract between the algorithms and the hardware: protocols, the registry, the reference."""

from .registry import Backend, BackendError, load

__all__ = ["Backend", "BackendError", "load"]
