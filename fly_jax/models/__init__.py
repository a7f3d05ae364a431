"""Model architectures: configuration, prepared weight shapes and forward passes."""
