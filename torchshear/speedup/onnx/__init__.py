"""Export to ONNX, checked in onnxruntime."""
