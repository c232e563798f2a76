"""Checkpoints in safetensors files: headers, tensors, and writing shards. Nothing is unpickled."""
