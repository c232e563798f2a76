"""A checkpoint and its structure: headers, tensors, linear layers, fusion groups, bytes."""
