"""What a scheme is, exactly: formats, names, rounding, scales."""
