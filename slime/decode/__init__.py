"""From features to part maps: decoders, edge refinement, and the second look at small objects."""
