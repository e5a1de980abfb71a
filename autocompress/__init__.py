"""autocompress: the best network that fits a budget on your device, with a number you can believe.

Importing this package loads numpy only; torch, optuna, onnx and ray are loaded by the parts that use them.
"""

__version__ = "0.1.0"
