"""Pure functions and value types of quantization: no nn.Module, no state."""
