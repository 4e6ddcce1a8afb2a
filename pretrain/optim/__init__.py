"""Optimizer: schedule, parameter groups, AdamW."""
