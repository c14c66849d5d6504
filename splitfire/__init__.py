"""Splitfire: disaggregated LLM inference. What the services are made of."""

__version__ = "0.1.0"
