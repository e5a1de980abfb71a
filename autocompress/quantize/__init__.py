"""Numbers of few bits: grids and quantizers, calibration, reconstruction, and networks whose bits are chosen."""
