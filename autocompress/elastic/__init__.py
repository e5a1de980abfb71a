"""The supernet: elastic layers, recalibration, extraction, width sorting."""
