"""Export to ONNX, checked in onnxruntime."""

from torchshear.speedup.onnx._export import OnnxFile, export_onnx

__all__ = ["OnnxFile", "export_onnx"]
