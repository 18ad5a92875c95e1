"""keepstill: head-motion correction for whole functional MRI studies."""

__version__ = "0.1.0"
