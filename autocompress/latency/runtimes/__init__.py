"""One file for each runtime; each has a `RUNTIME` (`autocompress.latency.runtime.Runtime`)."""
