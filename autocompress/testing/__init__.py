"""Contract suites that every plug-in, ours or a third party's, inherits in its tests."""
