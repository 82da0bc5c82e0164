"""From images and learned rows to part maps: look, read, refine, zoom."""
