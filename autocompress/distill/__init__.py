"""Finetuning with knowledge distillation."""
