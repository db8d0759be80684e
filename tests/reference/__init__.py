"""Independent implementations, which the tests compare with."""
