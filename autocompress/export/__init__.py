"""Export to ONNX, torch.export and safetensors, with parity checks and a manifest."""
