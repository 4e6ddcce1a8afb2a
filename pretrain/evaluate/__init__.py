"""Evaluation of trained models: retrieval, captioning and routing."""
