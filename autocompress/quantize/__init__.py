"""Numbers of few bits: grids, quantizers, calibration, reconstruction, networks whose bits are chosen."""
