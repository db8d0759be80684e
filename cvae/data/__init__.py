"""The images: where they come from, which pixels are observed, and batches of them on the device."""
