"""Drawing images from a trained generator, and keeping them as files."""
