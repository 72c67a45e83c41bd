"""What LRQK costs in quality."""
