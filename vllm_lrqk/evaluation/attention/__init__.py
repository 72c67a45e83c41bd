"""What attention methods lose of one layer's output, at equal device memory."""
