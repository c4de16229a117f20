"""The names of a run's ONNX files."""

FLOAT, FAKE_QUANT, DEPLOY = "float.onnx", "fake_quant.onnx", "deploy.onnx"
