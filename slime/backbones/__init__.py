"""Models whose features and attention are read; a new kind is one file that implements :class:`.base.Backbone`."""
