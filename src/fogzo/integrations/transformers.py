"""Hugging Face transformers."""

from fogzo.integrations.trainer import refine

__all__ = ["refine"]
