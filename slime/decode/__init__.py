"""From features to part maps: decoders, edge refinement, and close-ups of small objects."""
