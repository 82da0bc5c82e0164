"""What images are looked at with. A new kind of model is one file here that implements :class:`.base.Backbone`."""
