"""From a folder of images to batches of views, each a function of (seed, step)."""
