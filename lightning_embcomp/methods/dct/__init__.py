"""Dynamic communication thresholding: large gradients and activations cross the wire, the rest waits."""
