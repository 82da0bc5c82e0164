"""From features to part maps: decoders, edge refinement, and zoom on small objects."""
