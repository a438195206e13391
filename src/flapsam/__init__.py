"""Federated, parameter-efficient fine-tuning of the Segment Anything Model for medical volumes."""

__version__ = "0.1.0"
