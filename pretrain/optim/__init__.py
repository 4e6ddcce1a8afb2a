"""Optimizer: learning-rate schedule, parameter groups and AdamW."""
