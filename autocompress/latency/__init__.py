"""Latency of this device: targets, measuring, tables, corrections and error reports."""
